# SPDX-License-Identifier: Apache-2.0
# Iterations of the published settings.
recipe = dict(name="ahcq", w_bits=6, a_bits=6, iterations=20000)
