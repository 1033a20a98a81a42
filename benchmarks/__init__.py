"""What a step costs, by pytest-benchmark (`make bench`). Figures are ratios of one run: machines drift (section 6).

What is measured is what an operator runs: compiled where there is a build. Benchmarks borrow twins from `tests`, whose
package asks for the text unless somebody has asked before; so this one asks first, for itself and for what it starts.
"""

import os

os.environ.setdefault("SALESPUSH_COMPILED", "")
import engine  # noqa: F401  (before any room of another floor: engine.compiled decides where they come from)
