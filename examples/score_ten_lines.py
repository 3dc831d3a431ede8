"""The drop-in function: late interaction of your own embeddings, both ways, from one pass."""

import torch

import bagformer

text = bagformer.l2_normalize(torch.randn(8, 5, 256, requires_grad=True))  # 8 texts of 5 bags
image = bagformer.l2_normalize(torch.randn(100, 257, 256))  # 100 pictures of 257 patches
mask = torch.tensor([[True] * 4 + [False]] * 8)  # the last bag of each text is padding

scores = bagformer.maxsim(text, image, text_mask=mask, return_argmax=True)
print(scores.text_to_image.shape, scores.image_to_text.shape)  # [8, 100] and [100, 8]
print(scores.text_argmax[0, 0])  # the patch that each bag of text 0 chose in picture 0, -1: masked
scores.text_to_image.logsumexp(dim=1).sum().backward()  # differentiable; nothing [8, 100, 5, 257]
best = bagformer.maxsim_topk(text.detach(), image, 10, text_mask=mask)  # without the score matrix
print(best.indices[0])
