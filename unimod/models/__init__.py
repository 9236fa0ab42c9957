"""Backbones, layouts, checkpoints and image tokenizers.

How to add a model: a layout that writes its sequences, and a family that recognises and builds its folders. This is a
small unified Llama, images as ids of its vocabulary; the stock model has to call transformers' attention interface.

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from unimod.models.layout import CausalLayout
    from unimod.models.unified import UnifiedModel
    from unimod.models.weights import Family, special_ids

    class MyLayout(CausalLayout):
        kind = "mine"

        def t2i(self, caption, codes, *, prompt=False):
            return self.image_sequence([self.bos, *self.cut(caption), self.boi], codes, [self.eoi, self.eos], prompt)

        def mmu(self, codes, turns, open_ended=False):
            return self.conversation([self.bos, self.boi, *self.image_ids(codes), self.eoi], turns, open_ended)

    def layout(config, text):
        special = special_ids(config, {"bos": "<s>", "eos": "</s>", "boi": "<image>", "eoi": "</image>"}, text)
        code_ids = config["image_offset"] + torch.arange(config["codebook_size"])
        return MyLayout(text, special, code_ids, config["grid"], config["text_budget"], config["vocab_size"])

    FAMILY = Family("mine", "Mine: config.json with model_type llama and an image_offset", layout=layout,
                    recognises=lambda config: config.get("model_type") == "llama" and "image_offset" in config,
                    text=lambda config: (config["image_offset"], config["eos_token_id"], "</s>"),
                    build=lambda config, layout, _: UnifiedModel(LlamaForCausalLM(LlamaConfig(**config)), layout))

Put it in a file of its own and FAMILY into `checkpoint.FAMILIES`; `tests/models/test_add_a_model.py` builds, routes,
saves and loads such a model. What `layout` and `build` read has to be in `lm.config`, which is what is saved. Losses,
routing, capture, FLOPs, generation, `inspect` and saving then work. Masks that are not causal: write `t2i`, `mmu` and
`lm` of a `Layout` with `prefix_hi` and `suffix_hi` as in showo.py; `parts` cuts a sequence into stretches that compete
in a routed layer: `topk` where all tokens are known when the layer runs, `keep` for text that is generated, `threshold`
for images generated token by token. Codes with an embedding and a head of their own: override `embed`, `nll` and
`code_logits` of `UnifiedModel`, as janus.py does.
"""
