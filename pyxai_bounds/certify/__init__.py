"""From bounds to statements: properties of an explanation, certificates, certified radii."""

from pyxai_bounds.certify.certificate import Certificate, certified_radius, certify
from pyxai_bounds.certify.properties import L1, L2, Cosine, Linf, MeanSquare, Property, Sign, TopK
from pyxai_bounds.certify.targeted import Excluded, Unlike

__all__ = [
    "L1",
    "L2",
    "Certificate",
    "Cosine",
    "Excluded",
    "Linf",
    "MeanSquare",
    "Property",
    "Sign",
    "TopK",
    "Unlike",
    "certified_radius",
    "certify",
]
