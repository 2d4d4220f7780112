# SPDX-License-Identifier: Apache-2.0
"""Images, videos and box prompts for the pipelines."""
