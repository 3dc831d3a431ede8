"""The model: rank pictures for texts. Arguments: a model folder, and picture files."""

import sys

import torch
from PIL import Image

from bagformer import BagFormerForRetrieval, BagFormerProcessor

folder, pictures = sys.argv[1], [Image.open(path) for path in sys.argv[2:]]

model = BagFormerForRetrieval.from_pretrained(folder).eval()
processor = BagFormerProcessor.from_pretrained(folder)
with torch.inference_mode():
    output = model(**processor(text=["高领毛衣", "女士靴子"], images=pictures))
print(output.text_to_image, output.image_to_text, sep="\n")
