"""A small Show-o with random weights beside the plain reference of it, and sequences as both write them."""

from dataclasses import dataclass, replace

import torch
from reference import showo as ref
from transformers import PhiForCausalLM

from unimod.batch import TokenSequence
from unimod.models.showo import ShowoLayout, clip_projector, showo_config
from unimod.models.text import WordTokenizer
from unimod.models.unified import UnifiedModel

T, GRID, N, CODES, FEATURE_WIDTH = 10, (3, 4), 12, 16, 24
WORDS = ("red", "blue", "circle", "square", "is", "there", "yes", "no", "and")
EOT = "<|endoftext|>"


class Text(WordTokenizer):
    """Reads its end token where a text spells it, as Phi's tokenizer does."""

    def encode(self, text):
        ids = []
        for i, part in enumerate(text.split(EOT)):
            ids += [self.eot] * (i > 0) + super().encode(part)
        return ids


TEXT = Text(WORDS)
LAYOUT = ShowoLayout(TEXT, CODES, GRID, T)
VOCABULARY = ref.Vocabulary(TEXT.size, CODES, TEXT.eot)
CONFIG = ref.Config(layers=3, heads=4)


def make_model(seed=0):
    """Weights that make neither attention nor the next token near uniform, biases and gains that are not 0 or 1."""
    torch.manual_seed(seed)
    phi = showo_config(LAYOUT.vocab_size, width=64, layers=CONFIG.layers, heads=CONFIG.heads, ffn=128, max_positions=64)
    model = UnifiedModel(PhiForCausalLM(phi), LAYOUT, clip_projector(FEATURE_WIDTH, 64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(0.3 * torch.randn_like(p))
        for layer in model.layers:
            layer.self_attn.q_layernorm.weight.mul_(2)
        model.head.weight.mul_(3)
    return model


def state_of(model):
    """The model's own tensors under the published names."""
    parts = {"showo.": model.lm, "mm_projector.": model.projector}
    return {
        prefix + key: value for prefix, part in parts.items() for key, value in part.state_dict(keep_vars=True).items()
    }


@dataclass(frozen=True)
class Pair:
    """One sequence as the library and as the reference write it."""

    task: str
    row: TokenSequence
    ids: list[int]
    labels: list[int]
    system: int = 0

    @property
    def real(self):
        """Which of the reference's places hold no pad."""
        return torch.tensor([i for i, token in enumerate(self.ids) if token != VOCABULARY.pad])

    @property
    def order(self):
        """The library's tokens in the reference's order, which is another one for CLIP features only."""
        return self.row.position.argsort()

    def allow(self):
        return ref.allow(self.task, self.ids, VOCABULARY, self.system)

    def logits(self, state):
        """The reference's, of all places, pads and all: [L, V]."""
        embeds = None if self.row.features is None else ref.project(state, self.row.features)
        return ref.forward(state, CONFIG, self.ids, self.allow(), embeds)

    def targets(self):
        """What the reference's loss compares the logits of each place with: [L]."""
        if self.task == "t2i":
            return torch.tensor([ref.IGNORE] * (T + 1) + self.labels[T + 1:])
        return torch.tensor([*self.labels[1:], ref.IGNORE])


def t2i(caption, codes, masked):
    true = codes + VOCABULARY.image_offset
    ids, labels = ref.t2i_row(VOCABULARY, TEXT.encode(caption), torch.where(masked, VOCABULARY.mask, true), T,
                              torch.where(masked, true, ref.IGNORE))
    return Pair("t2i", LAYOUT.t2i(caption, codes, masked), ids, labels)


def t2i_generation(caption):
    ids, labels = ref.t2i_gen_row(VOCABULARY, TEXT.encode(caption), N, T)
    row = LAYOUT.t2i(caption, torch.zeros(N, dtype=torch.long), torch.ones(N, dtype=torch.bool))
    return Pair(
        "t2i", replace(row, target=torch.full_like(row.target, ref.IGNORE)), ids, labels
    )  # its targets are of a picture yet to be made


def lm(text):
    return Pair("lm", LAYOUT.lm(text), *ref.lm_row(VOCABULARY, TEXT.encode(text), T + N + 3))


def caption(codes, text):
    return Pair("mmu", LAYOUT.mmu_caption(codes, text),
                *ref.mmu_caption_row(VOCABULARY, codes + VOCABULARY.image_offset, TEXT.encode(text), T))


def ask(codes, text):
    return Pair("mmu", LAYOUT.mmu_caption(codes, text, open_ended=True),
                *ref.mmu_ask_row(VOCABULARY, codes + VOCABULARY.image_offset, TEXT.encode(text)))


def rounds(turns):
    return [(TEXT.encode(f"USER: {question} ASSISTANT:"), TEXT.encode(f" {answer}")) for question, answer in turns]


def conversation(codes, turns):
    return Pair("mmu", LAYOUT.mmu(codes, turns),
                *ref.mmu_llava_row(VOCABULARY, codes + VOCABULARY.image_offset, rounds(turns), T))


def clip(features, turns, system=""):
    """Beside rows of N picture tokens: all are T + N + 3 long."""
    prompt = TEXT.encode(system)
    ids, labels = ref.mmu_clip_row(VOCABULARY, len(features), rounds(turns), T - (len(features) - N), prompt)
    return Pair("mmu_clip", LAYOUT.mmu(features, turns, system=system), ids, labels, len(prompt))


def some_rows(seed=0):
    """Rows of every kind and of different lengths."""
    g = torch.Generator().manual_seed(seed)
    def codes():
        return torch.randint(CODES, (N,), generator=g)
    def masked(share):
        return torch.rand(N, generator=g) < share
    def features(n):
        return torch.randn(n, FEATURE_WIDTH, generator=g)
    return [
        t2i("red circle", codes(), masked(0.6)),
        t2i("", codes(), masked(0.9)),
        t2i("red " * 20, codes(), masked(0.2)),
        lm("there is a blue square"),
        lm("no " * 40),
        conversation(codes(), [("red ?", "yes"), ("blue ?", "no")]),
        conversation(codes(), [("is there a blue square and a circle", "no")]),
        caption(codes(), "a red circle"),
        caption(codes(), "square " * 20),
        clip(features(5), [("red ?", "yes")]),
        clip(features(7), [("circle", "no"), ("blue ?", "yes")], system="You are helpful"),
    ]
