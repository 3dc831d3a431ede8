"""Bags: from texts and a dictionary to one vector for each word."""

import torch
from transformers import BertTokenizer

from bagformer import BagSegmenter, bag_pool
from bagformer.assets import sample_path, vocabulary_path

tokenizer = BertTokenizer(str(vocabulary_path()), do_lower_case=True)
words = sample_path() / "entities.txt"  # one entity a line
masked = ("[CLS]", "[SEP]", "[PAD]")
segmenter = BagSegmenter.from_dictionary(words, tokenizer, masked_tokens=masked)
ids = tokenizer(["高领毛衣", "女士靴子"], padding=True, return_tensors="pt").input_ids
bags = segmenter(ids)  # a text's bags are the same in any batch
pooled = bag_pool(torch.randn(*ids.shape, 768), bags)  # your encoder's output: [2, bags, 768]

for row in range(len(bags)):
    spans = [tokenizer.decode(ids[row, start:end]) for start, end in bags.spans(row)]
    print(spans, bags.mask[row].tolist())
print(pooled.shape)
