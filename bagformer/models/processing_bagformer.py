"""Texts and pictures to model inputs, and model outputs to scores and explanations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BertTokenizer, ProcessorMixin
from transformers.image_processing_utils import BatchFeature
from transformers.utils import cached_file

from bagformer.bags import Bags, BagSegmenter
from bagformer.data.images import transparency_of
from bagformer.dictionary import token_ids_of
from bagformer.models.configuration_bagformer import PROTOCOL_DEFAULTS, BagFormerConfig
from bagformer.models.image_processing_bagformer import BagFormerImageProcessor
from bagformer.models.tokens import Encoded, as_length, as_texts, check_vocabulary, clean, encode
from bagformer.ops.maxsim import maxsim

CONFIG_FILE = "processor_config.json"
BAGS_FILE = "bags.bin"
PADDINGS = ("max_length", "longest")
# Arguments of from_pretrained that decide where a file is looked for.
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class Explanation(NamedTuple):
    """Which patch won for each bag, of text b with picture b.

    ``heatmap [B, N, rows, columns]`` and ``cls [B, N]``: similarity of each bag with every patch
    and with patch 0 (the CLS token). ``best [B, N]``: the winner among all patches, 0 = CLS, -1 for
    a masked bag; ``position [B, N, 2]``: its row and column, -1 where ``best`` is below 1;
    ``score [B, N]``: the similarity it won with, 0 for a masked bag.
    """

    heatmap: Tensor
    cls: Tensor
    best: Tensor
    position: Tensor
    score: Tensor


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _as_rows(name: str, embeddings: Tensor | Sequence[Tensor]) -> list[Tensor]:
    rows = list(embeddings.unbind()) if isinstance(embeddings, Tensor) else list(embeddings)
    if not rows:
        raise ValueError(f"{name} is empty")
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dim() != 2 or row.shape[1] != rows[0].shape[1]:
            raise ValueError(f"{name}[{index}] must be [n, {rows[0].shape[-1]}]")
    return rows


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


class BagFormerProcessor(ProcessorMixin):
    """Image processor, tokenizer and bag segmenter of one model.

    - ``segmenter``: a :class:`bagformer.BagSegmenter`; None makes every token a bag of its own.
    - ``max_text_length``: tokens of a text, special tokens included.
    - ``sep_token``: whether a text ends in [SEP].

    Whether letters are lower-cased is the tokenizer's ``do_lower_case``; the dictionary went
    through the same tokenizer, so both always agree.
    """

    def __init__(
        self,
        image_processor: BagFormerImageProcessor,
        tokenizer: BertTokenizer,
        segmenter: BagSegmenter | None = None,
        max_text_length: int = 25,
        sep_token: bool = True,
        chat_template: None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if segmenter is None:
            names = PROTOCOL_DEFAULTS["corrected"]["masked_tokens"]
            segmenter = BagSegmenter((), masked_ids=token_ids_of(tokenizer, names))
        max_text_length = as_length(max_text_length, 0, "max_text_length")
        if not isinstance(sep_token, bool):
            raise TypeError(f"sep_token must be True or False, got {sep_token!r}")
        if max_text_length < 2 + int(sep_token):
            raise ValueError(f"max_text_length={max_text_length} leaves no room for text")
        self.segmenter = segmenter
        self.max_text_length = max_text_length
        self.sep_token = sep_token

    @classmethod
    def from_config(
        cls,
        config: BagFormerConfig,
        tokenizer: BertTokenizer | str | Path,
        dictionary: str | Path | BagSegmenter | None = None,
    ) -> BagFormerProcessor:
        """The processor that fits a model's configuration.

        ``tokenizer``: a tokenizer, or what ``BertTokenizer.from_pretrained`` takes. ``dictionary``:
        a file with one entity a line, or a segmenter; None makes every token a bag of its own.
        """
        reader = tokenizer
        if isinstance(reader, (str, Path)):
            reader = BertTokenizer.from_pretrained(str(reader))
        check_vocabulary(reader)
        masked = tuple(config.masked_tokens)
        if dictionary is None:
            ids = token_ids_of(reader, masked)
            segmenter = BagSegmenter((), matcher=config.matcher, masked_ids=ids)
        elif isinstance(dictionary, BagSegmenter):
            segmenter = dictionary
            if segmenter.matcher != config.matcher:
                raise ValueError(
                    f"the segmenter's matcher is {segmenter.matcher!r}, the configuration's is "
                    f"{config.matcher!r}"
                )
        else:
            segmenter = BagSegmenter.from_dictionary(
                dictionary, reader, matcher=config.matcher, masked_tokens=masked
            )
        image_processor = BagFormerImageProcessor(
            config.vision_config.image_size, transparency=transparency_of(config.protocol)
        )
        return cls(
            image_processor, reader, segmenter, config.max_text_length, bool(config.sep_token)
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: str = "max_length",
        truncation: bool = True,
        max_length: int | None = None,
        return_truncated: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Model inputs.

        Texts give ``input_ids [B, T]`` and ``attention_mask [B, T]`` int64, ``bag_offsets
        [B, N + 1]`` int32 and ``bag_mask [B, N]`` bool; pictures give ``pixel_values [B, 3, H, W]``
        float32.
        ``padding``: to ``max_length`` (default ``max_text_length``) or to the ``longest`` text.
        A text that is too long is cut, and ``return_truncated`` adds ``truncated [B]`` bool saying
        which were; ``truncation=False`` raises ValueError instead. An empty or blank text is its
        special tokens alone: none of its bags counts. Lone surrogates become U+FFFD.
        """
        if text is None and images is None:
            raise ValueError("give text, images or both")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        data: dict[str, Tensor] = {}
        if text is not None:
            encoded = self._encode(text, truncation, max_length)
            ids, attention = self._pad_ids(encoded, padding, max_length)
            bags = self.segmenter(ids)
            data |= {"input_ids": ids, "attention_mask": attention}
            data |= {"bag_offsets": bags.offsets, "bag_mask": bags.mask}
            if return_truncated:
                data["truncated"] = torch.tensor([one.truncated for one in encoded])
        if images is not None:
            data |= self.image_processor(images)
        return BatchFeature(data)

    def process_images(self, images: Any, **kwargs: Any) -> BatchFeature:
        """``self(images=images)``, the name ColPali's processor has."""
        return self(images=images, **kwargs)

    def process_queries(self, text: str | Sequence[str], **kwargs: Any) -> BatchFeature:
        """``self(text=text)``, the name ColPali's processor has."""
        return self(text=text, **kwargs)

    def _encode(self, text: Any, truncation: bool, max_length: int | None) -> list[Encoded]:
        length = as_length(max_length, self.max_text_length)
        encoded = encode(self.tokenizer, as_texts(text), length, self.sep_token)
        if not truncation:
            for row, one in enumerate(encoded):
                if one.truncated:
                    raise ValueError(f"text[{row}] has more tokens than max_length allows")
        return encoded

    def _pad_ids(
        self, encoded: list[Encoded], padding: str, max_length: int | None
    ) -> tuple[Tensor, Tensor]:
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        length = as_length(max_length, self.max_text_length)
        if padding == "longest":
            length = max(len(one.ids) for one in encoded)
        ids = torch.full((len(encoded), length), self.tokenizer.pad_token_id, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, one in enumerate(encoded):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            attention[row, : len(one.ids)] = 1
        return ids, attention

    def bag_texts(
        self, text: str | Sequence[str], counted_only: bool = True, **kwargs: Any
    ) -> list[list[str]]:
        """The strings of each text's bags, as written in the text.

        Only the bags that count; with ``counted_only=False`` all, in the order of ``bag_offsets``:
        special tokens by name and an empty bag as an empty string. ``kwargs``: ``padding`` and
        ``max_length`` as in a call, which matter to the matchers of the original.
        """
        texts = as_texts(text)
        encoded = self._encode(texts, True, kwargs.get("max_length"))
        ids, _ = self._pad_ids(
            encoded, kwargs.get("padding", "max_length"), kwargs.get("max_length")
        )
        bags = self.segmenter(ids)
        return [
            self._texts_of_row(clean(one_text, "text"), one, ids[row], bags, row, counted_only)
            for row, (one_text, one) in enumerate(zip(texts, encoded, strict=True))
        ]

    def _texts_of_row(
        self, text: str, one: Encoded, ids: Tensor, bags: Bags, row: int, counted_only: bool
    ) -> list[str]:
        found = []
        keep = bags.mask[row].tolist()
        for bag, (start, end) in enumerate(bags.spans(row)):
            if counted_only and not keep[bag]:
                continue
            spans = [span for span in one.spans[start:end] if span is not None]
            if spans:
                found.append(text[spans[0][0] : spans[-1][1]])
            else:
                tokens = self.tokenizer.convert_ids_to_tokens(ids[start:end].tolist())
                found.append("".join(tokens))
        return found

    def score_retrieval(
        self,
        query_embeddings: Tensor | Sequence[Tensor],
        passage_embeddings: Tensor | Sequence[Tensor],
        batch_size: int = 128,
        output_dtype: torch.dtype | None = None,
        output_device: torch.device | str = "cpu",
    ) -> Tensor:
        """Scores ``[queries, passages]``: for each bag the best patch, summed.

        Embeddings are ``[n, length, D]`` or a list of ``[length, D]``; zero rows, as masked bags
        are, add nothing. Computed in float32; ``output_dtype`` defaults to that of the embeddings.
        """
        queries = _as_rows("query_embeddings", query_embeddings)
        passages = _as_rows("passage_embeddings", passage_embeddings)
        if queries[0].device != passages[0].device:
            raise ValueError("query_embeddings and passage_embeddings must be on one device")
        if queries[0].dtype != passages[0].dtype:
            raise ValueError("query_embeddings and passage_embeddings must have one dtype")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        rows = []
        for start in range(0, len(queries), batch_size):
            text, text_mask = _pad(queries[start : start + batch_size])
            columns = []
            for other in range(0, len(passages), batch_size):
                image, image_mask = _pad(passages[other : other + batch_size])
                scores: Any = maxsim(
                    text,
                    image,
                    text_mask=text_mask,
                    image_mask=image_mask,
                    directions="text_to_image",
                )
                columns.append(scores.text_to_image.to(output_device))
            rows.append(torch.cat(columns, dim=1))
        return torch.cat(rows).to(output_dtype or queries[0].dtype)

    def explain(
        self,
        text_features: Tensor,
        image_features: Tensor,
        patch_grid: tuple[int, int],
        text_mask: Tensor | None = None,
    ) -> Explanation:
        """Which patch won for each bag, of text b with picture b.

        ``text_features [B, N, D]`` (or ``[N, D]``), ``image_features [B, P, D]`` (or ``[P, D]``)
        and ``patch_grid`` as the model gives them, ``text_mask [B, N]``.
        """
        text = text_features[None] if text_features.dim() == 2 else text_features
        image = image_features[None] if image_features.dim() == 2 else image_features
        height, width = patch_grid
        if len(text) != len(image):
            raise ValueError(f"got {len(text)} texts and {len(image)} pictures; pair them first")
        if image.shape[1] != height * width + 1:
            raise ValueError(
                f"patch_grid {height} x {width} needs {height * width + 1} patches, CLS included, "
                f"got {image.shape[1]}"
            )
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if text_mask is not None:
            mask = text_mask.bool().view(text.shape[:2])
        similarity = text.float() @ image.float().transpose(1, 2)
        similarity = similarity.masked_fill(~mask[..., None], 0.0)
        score, best = similarity.max(dim=2)
        best = best.masked_fill(~mask, -1)
        inside = best > 0
        patch = (best - 1).clamp_min(0)
        position = torch.stack([patch // width, patch % width], dim=-1)
        return Explanation(
            similarity[:, :, 1:].unflatten(2, (height, width)),
            similarity[:, :, 0],
            best,
            position.masked_fill(~inside[..., None], -1),
            score,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "processor_class": type(self).__name__,
            "max_text_length": self.max_text_length,
            "sep_token": self.sep_token,
            "image_processor": self.image_processor.to_dict(),
        }

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write tokenizer, image processor, the bags and their sha256 into a folder."""
        if push_to_hub or kwargs:
            raise ValueError("save into a folder first, then upload the folder")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        self.segmenter.save(folder / BAGS_FILE)
        described = self.to_dict()
        described["bags_file"] = BAGS_FILE
        described["bags_sha256"] = _sha256(folder / BAGS_FILE)
        text = json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        return [str(folder / CONFIG_FILE), str(folder / BAGS_FILE)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> BagFormerProcessor:
        """Read what :meth:`save_pretrained` wrote.

        Raises ValueError where the bags file is not the one that was saved, OSError where a file is
        missing. A name that is no folder is looked up as transformers does.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
        if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".")):
            raise FileNotFoundError(f"no such folder: {name}")
        config_path = str(cached_file(name, CONFIG_FILE, **hub))
        try:
            described = json.loads(Path(config_path).read_text(encoding="utf-8"))
            bags_name, expected = str(described["bags_file"]), described["bags_sha256"]
            options = {key: described[key] for key in ("max_text_length", "sep_token")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{config_path} is not a BagFormer processor: {error!r}") from error
        if bags_name != Path(bags_name).name:
            raise ValueError(
                f"{config_path}: bags_file must be a plain file name, got {bags_name!r}"
            )
        bags_path = str(cached_file(name, bags_name, **hub))
        actual = _sha256(bags_path)
        if actual != expected:
            raise ValueError(
                f"{bags_path} is not the file that was saved: sha256 {actual}, expected {expected}"
            )
        tokenizer = BertTokenizer.from_pretrained(name, **hub)
        check_vocabulary(tokenizer)
        return cls(
            BagFormerImageProcessor.from_pretrained(name, **hub),
            tokenizer,
            BagSegmenter.load(bags_path),
            **options,
        )
