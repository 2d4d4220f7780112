# SPDX-License-Identifier: Apache-2.0
"""What several rooms need and that knows nothing of quantization: files, digests, processes, batches, time, caches."""
