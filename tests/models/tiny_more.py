"""Tiny Chameleon and Janus of transformers, saved by transformers, and rows for them."""

import json

import torch
from tiny_emu3 import LETTERS, Letters
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, JanusConfig, JanusForConditionalGeneration

from unimod.models.checkpoint import from_pretrained

KINDS = ("chameleon", "chameleon swin", "janus")
N = len(LETTERS)
CODES, SIDE = 24, 3
NAMED = {"<s>": N, "<pad>": N + 1, "</s>": N + 2, "<racm3:break>": N + 3, "<eoss>": N + 4, "<reserved08706>": N + 5,
         "<image>": N + 6}
ORDER = torch.randperm(CODES, generator=torch.Generator().manual_seed(0)).tolist()
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512}
VQ = {"num_embeddings": CODES, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1, 1],
      "num_res_blocks": 1}
JANUS_IDS = {"bos": N, "eos": N + 1, "boi": N + 2, "eoi": N + 3}
PLACEHOLDER = {"chameleon": NAMED["<image>"], "janus": N + 4}


def code_name(code):
    """IMGIMG, the decimal digits as letters (0 is A), Z."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def stock_model(kind, **more):
    """With weights large enough that attention is not uniform. Chameleon's codes lie in the vocabulary in no order."""
    if kind.startswith("chameleon"):
        words = {**{c: i for i, c in enumerate(LETTERS)}, **NAMED,
                 **{code_name(c): N + 7 + at for c, at in enumerate(ORDER)}}
        config = ChameleonConfig(vocab_size=N + 7 + CODES, vocabulary_map=words, swin_norm=kind.endswith("swin"),
                                 image_seq_length=SIDE * SIDE,
                                 rope_parameters={"rope_type": "default", "rope_theta": 5e3},
                                 vq_config={**VQ, "embed_dim": 16, "resolution": 6}, **TEXT, **more)
        build = ChameleonForConditionalGeneration
    else:
        config = JanusConfig(
            text_config={"model_type": "llama", "vocab_size": N + 5, "bos_token_id": N, "eos_token_id": N + 1, **TEXT},
            vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24,
                           "patch_size": 8, "num_image_tokens": SIDE * SIDE, "projection_dim": 64},
            vq_config={**VQ, "embed_dim": 8, "projection_dim": 64, "image_token_embed_dim": 64},
            image_token_id=N + 4,
            **{"tie_word_embeddings": False, **more},
        )
        build = JanusForConditionalGeneration
    torch.manual_seed(0)
    model = build(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "vqmodel" not in name:
                p.mul_(6 if p.ndim > 1 and "norm" not in name else 1.2).add_(torch.randn_like(p), alpha=0.02)
        model.model.vqmodel.quantize.embedding.weight.normal_()
    return model


def inner(stock):
    """transformers' stack of decoder layers."""
    return getattr(stock.model, "language_model", stock.model)


def save_stock(stock, folder):
    """As transformers saves it; the ids that only Janus' tokenizer knows are added to config.json."""
    stock.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "janus":
        config |= {f"{name}_token_id": i for name, i in JANUS_IDS.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, **options):
    return from_pretrained(folder, text=Letters(), text_budget=60, **options)[0]


def pixels(kind, count=2):
    side = 24 if kind == "janus" else 6
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def pictures_of(kind, stock):
    """Input of an understanding row for each of `pixels`: vision features, or codes of the model's own tokenizer."""
    inner = stock.model
    if kind == "janus":
        return list(inner.vision_model(pixels(kind)).last_hidden_state)
    return list(inner.vqmodel.encode(pixels(kind)).image_tokens.view(2, -1))


def make_rows(model, pictures):
    """t2i, t2i, mmu, mmu (open-ended), lm."""
    g, layout = torch.Generator().manual_seed(1), model.layout
    codes = torch.randint(CODES, (2, SIDE * SIDE), generator=g)
    return [layout.t2i("a red circle", codes[0]), layout.t2i("", codes[1]),
            layout.mmu(pictures[0], [("is it?", "yes"), ("red?", "no")]),
            layout.mmu(pictures[1], [("what", "")], open_ended=True), layout.lm("plain text")]


def padded(rows, side, placeholder):
    """transformers' input for rows: ids (a feature is the placeholder), mask and positions; and the real tokens."""
    longest = max(len(r.ids) for r in rows)
    ids, mask = torch.full((len(rows), longest), 1), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row.ids), None) if side == "left" else slice(0, len(row.ids))
        ids[i, where], mask[i, where] = row.ids.masked_fill(row.ids < 0, placeholder), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, mask.bool()
