"""X(3)mat: what a nanoporous crystal does, and where in the crystal it comes from."""

from x3mat.crystal import Crystal, crystal_from_arrays, read_crystal
from x3mat.errors import CrystalError, DataError, ModelError, X3MatError
from x3mat.maps import SiteMap, explain
from x3mat.predict import Ensemble, Prediction, load_model, predict
from x3mat.sampling import Windows, sample_windows

__version__ = "0.1.0"

__all__ = ["Crystal", "CrystalError", "DataError", "Ensemble", "ModelError", "Prediction",
           "SiteMap", "Windows", "X3MatError", "crystal_from_arrays", "explain", "load_model",
           "predict", "read_crystal", "sample_windows"]
