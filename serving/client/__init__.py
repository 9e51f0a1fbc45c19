"""Features over HTTP, with neither torch nor Ray; numpy arrays come back.

with FeatureClient("http://127.0.0.1:8000") as client:
    vectors = client.embed(["cat.jpg", open("dog.png", "rb").read()], model="mae-photos")

async with AsyncFeatureClient("http://127.0.0.1:8000") as client:
    features = await client.features("cat.jpg", model="mae-photos", layers=(2, 5, 8, 11))
    (found,) = await client.predict(["street.jpg"], model="mae-photos")  # by its trained heads

`core` holds the operations as `steps`, `results` and `findings` read their answers, `retries` sends
a request again; the two clients only send and wait. `Size` is the size of a model's input.
"""

from mimray.serving.client.blocking import FeatureClient
from mimray.serving.client.core import Size
from mimray.serving.client.findings import Classification, Detection, Finding, Segmentation
from mimray.serving.client.images import Image
from mimray.serving.client.nonblocking import AsyncFeatureClient
from mimray.serving.client.results import Features, Reconstruction

__all__ = [
    "AsyncFeatureClient",
    "Classification",
    "Detection",
    "FeatureClient",
    "Features",
    "Finding",
    "Image",
    "Reconstruction",
    "Segmentation",
    "Size",
]
