# SPDX-License-Identifier: Apache-2.0
"""Why figures are what they are, tables of results, and the training of the packaged models; tools alone call these."""
