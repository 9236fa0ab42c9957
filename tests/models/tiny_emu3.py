"""A tiny Emu3 of transformers, its vocabulary and its three file layouts."""

import json
import re
import string

import torch
from safetensors.torch import save_file
from transformers import Emu3Config, Emu3ForConditionalGeneration

LETTERS = string.printable
SPECIAL = {"<|endoftext|>": 100, "<image>": 101, "<|extra_200|>": 102, "<|extra_201|>": 103, "<|extra_203|>": 104,
           "<|extra_204|>": 105, "<|image token|>": 106, "<|image start|>": 107, "<|image end|>": 108}
SHORT = {100: "<pad>", 102: "<eol>", 103: "<eof>", 104: "<bos>", 105: "<eos>", 106: "<img>", 107: "<boi>", 108: "<eoi>"}
OFFSET, CODES = 109, 64
VQ = {"codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
      "channel_multiplier": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [3], "hidden_size": 64,
      "num_attention_heads": 1, "temporal_downsample_factor": 4}


class Letters:
    """A text tokenizer with one token per character, whose decode shows every id."""

    size, eot = len(LETTERS), len(LETTERS)

    def encode(self, text):
        return [LETTERS.index(c) for c in text]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def token(self, i):
        return LETTERS[i]


def written(ids):
    """A sequence as one reads it: characters, special tokens by name, codes in square brackets."""
    return "".join(LETTERS[i] if i < 100 else SHORT[i] if i < OFFSET else f"[{i - OFFSET}]" for i in ids.tolist())


def stock_emu3(special=SPECIAL, seed=0):
    """transformers' Emu3 of the smallest sizes, with weights large enough that attention is not uniform."""
    vocabulary = {**{c: i for i, c in enumerate(LETTERS)}, **special}
    first = max(vocabulary.values()) + 1
    vocabulary |= {f"<|visual token {c:06d}|>": first + c for c in range(CODES)}
    config = Emu3Config(
        text_config={"vocab_size": first + CODES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
                     "rms_norm_eps": 1e-4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
                     "pad_token_id": special["<|endoftext|>"], "bos_token_id": special["<|extra_203|>"],
                     "eos_token_id": special["<|extra_204|>"]},
        vq_config=VQ,
        vocabulary_map=vocabulary,
    )
    torch.manual_seed(seed)
    model = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "vqmodel" not in name:
                p.mul_(5 if p.ndim > 1 else 1.1)
        for name, buffer in model.model.vqmodel.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
        model.model.vqmodel.quantize.embedding.weight.normal_()
    return model


def write(folder, state, config):
    folder.mkdir(exist_ok=True)
    save_file(
        {k: v.clone().contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))


def as_split(stock, folder):
    """The layout of the first converted models: text_model.model., text_model.lm_head, vqmodel."""
    state = {
        re.sub(r"^lm_head", "text_model.lm_head",
               re.sub(r"^model\.vqmodel", "vqmodel", re.sub(r"^model\.text_model", "text_model.model", k))): v
        for k, v in stock.state_dict().items()
    }
    write(folder, state, json.loads(stock.config.to_json_string()))


def as_baai(stock, folder):
    """BAAI's own: model., lm_head and a flat config.json with ids and no names; the vision tokenizer is elsewhere."""
    state = {k.replace("model.text_model.", "model."): v for k, v in stock.state_dict().items() if "vqmodel" not in k}
    flat = {k: v for k, v in stock.config.text_config.to_dict().items() if k != "rope_parameters"}
    ids = {f"{SHORT[i][1:-1]}_token_id": i for i in SHORT}
    write(
        folder,
        state,
        {**flat, **ids, "model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], "rope_theta": 5e4,
         "image_area": 518400},
    )


def as_baai_vision(stock, folder):
    """BAAI's vision tokenizer: shorter names, attention of 1 x 1 convolutions with its norm inside."""
    state = {}
    for key, value in stock.model.vqmodel.state_dict().items():
        name = re.sub(r"(encoder|decoder)\.(down|up)_block\.", r"\1.", key).replace("middle_block.", "mid.")
        name = re.sub(r"attn_norms\.(\d+)\.", r"attn.\1.norm.", name).replace("attn_norm.", "attn_1.norm.")
        if found := re.search(r"\.(q|k|v|out)_proj\.", name):
            name = name.replace(found[0], ".proj_out." if found[1] == "out" else f".{found[1]}.")
            value = value[..., None, None] if value.ndim == 2 else value
        state[name] = value
    write(folder, state, {"model_type": "Emu3VisionVQ"})
    return state
