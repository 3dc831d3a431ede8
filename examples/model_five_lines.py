"""The model: rank pictures for texts. Arguments: picture files."""

import sys

import torch
from PIL import Image

from bagformer import BagFormerForRetrieval, BagFormerProcessor
from bagformer.assets import tiny_model_path

if len(sys.argv) < 2:
    sys.exit(f"usage: {sys.argv[0]} PICTURE [PICTURE ...]")
pictures = [Image.open(path) for path in sys.argv[1:]]
folder = tiny_model_path()  # or any folder of save_pretrained, or of `bagformer convert`

model = BagFormerForRetrieval.from_pretrained(folder).eval()
processor = BagFormerProcessor.from_pretrained(folder)
with torch.inference_mode():
    output = model(**processor(text=["高领毛衣", "女士靴子"], images=pictures))
print(output.text_to_image, output.image_to_text, sep="\n")
