"""Grand-canonical Monte Carlo of rigid molecules in rigid frameworks, on cores and CUDA.

In the order in which data flows: `framework` (crystals and their charges), `charges` (predicted
where none are stated; needs torch), `forcefield`,
`system` (cells, Ewald terms, energy grids), `kernel` (the chains, compiled by numba), `engine`
(runs and averages), `shards` (what several processes share), `lattice_gas` (densities without a
run, which networks correct). ``x3mat gcmc`` is the command,
``tools/gcmc_checks.py`` compares with other programs. The package needs numba
(``pip install x3mat[labels]``), for NVIDIA cards also numba-cuda.
"""

from x3mat_gcmc.engine import GCMCResult, Loading, gcmc
from x3mat_gcmc.framework import Framework
from x3mat_gcmc.system import GCMCSettings

__all__ = ["Framework", "GCMCSettings", "GCMCResult", "Loading", "gcmc"]
