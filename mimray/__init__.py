"""Pre-train an image encoder on pictures of one's own, search how, and serve it.

The four packages lie beside this one at the top of the repository and are imported through it
alone (`mimray.trainers`), by links that wheels, editors and Ray's uploads follow: names as common
as theirs would otherwise meet other people's.
"""

__version__ = "0.1.0"
