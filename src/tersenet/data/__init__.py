"""Data by name: images in memory as 8-bit tensors, given out as batches that can be started anywhere."""

from tersenet.data.batches import TensorBatches as TensorBatches
from tersenet.data.sources import Sources as Sources
from tersenet.data.sources import open_data as open_data
