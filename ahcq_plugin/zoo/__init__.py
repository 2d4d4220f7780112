# SPDX-License-Identifier: Apache-2.0
"""Models, weights and images that come with the package, so that everything runs without a download."""
