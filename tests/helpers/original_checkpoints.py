"""Tiny checkpoints in the layouts of LLaVA's and VoCo-LLaMA's own repositories."""

import json
from pathlib import Path

import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from transformers import LlamaConfig, LlamaForCausalLM


PATCHES = 9
WIDTH, TOWER_WIDTH = 48, 64
JOINED = ["▁w", "at", "▁wh", "▁what", "▁c", "ol", "▁col", "ou", "▁colou", "▁colour", "SE", "US", "USE", "▁USE", "▁USER"]
JOINED += ["▁A", "is", "▁is", "ha", "wha", "hat"]
LETTERS = sorted({letter for word in [*JOINED, "▁ASSISTANT:.?', red"] for letter in word} | {"▁"})


def vocabulary(joined: list[str] = JOINED, letters: list[str] = LETTERS) -> list[tuple[str, float, int]]:
    """Piece, score and kind, in the order of Llama's: what joins first has the best score, letters have the worst."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    in_bytes = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return special + in_bytes + [(text, -float(rank), 1) for rank, text in enumerate([*joined, *letters])]


def write_sentencepiece(path: Path, kind: int = TrainerSpec.BPE, entries: list | None = None) -> None:
    model = ModelProto()
    for text, score, type_ in entries or vocabulary():
        model.pieces.add(piece=text, score=score, type=type_)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = kind, True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())


VOCABULARY = len(vocabulary())


def write_original(folder: Path, clip: Path, voco: bool = False, seed: int = 3, **changes) -> Path:
    """A LLaVA-1.5 as its repository publishes it: two pickled shards with an index, no vision tower."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    text = {
        "vocab_size": VOCABULARY + voco,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = {
        **text,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama" if voco else "llava",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": TOWER_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(clip),
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        **changes,
    }
    tensors = dict(LlamaForCausalLM(LlamaConfig(**text)).state_dict())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(6)
    for name, shape in (("0", (WIDTH, TOWER_WIDTH)), ("2", (WIDTH, WIDTH))):
        tensors[f"model.mm_projector.{name}.weight"] = torch.randn(shape) / 4
        tensors[f"model.mm_projector.{name}.bias"] = torch.randn(WIDTH) / 4
    save_pickled(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "max_length": 4096}))
    write_sentencepiece(folder / "tokenizer.model")
    special = {"__type": "AddedToken", "normalized": False, "lstrip": False}
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None, "model_max_length": 2048}
    tokenizer |= {
        f"{n}_token": {**special, "content": t} for n, t in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if voco:
        (folder / "added_tokens.json").write_text(json.dumps({"<voco>": VOCABULARY}))
    (folder / "README.md").write_text("---\nlicense: llama2\n---\nLLaVA\n")
    return folder


def save_pickled(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    keys = list(tensors)
    weight_map = {key: names[2 * place // len(keys)] for place, key in enumerate(keys)}
    for name in names:
        torch.save({key: tensors[key] for key in keys if weight_map[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
