"""Save a checkpoint's teacher for transformers: to_transformers.py CHECKPOINT FOLDER.

from_pretrained(FOLDER) of Dinov2Model, or of Dinov2WithRegistersModel, loads it. Its inputs are
normalized as pixel_mean and pixel_std of the teacher say.
"""

import re
import sys

import transformers
from lightly_baseline import dinov2

NAMES = [(r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1")]
NAMES += [
    ("^pos_embed", "embeddings.position_embeddings"),
    (r"\bls([12]).gamma", r"layer_scale\1.lambda1"),
]
NAMES += [("^patch_embed.proj", "embeddings.patch_embeddings.projection"), ("^norm", "layernorm")]
NAMES += [("^blocks", "encoder.layer"), ("attn.proj", "attention.o_proj")]


def to_transformers(backbone):
    """Return transformers' network with the weights of a VisionTransformer, in eval mode."""
    b, kind = backbone, "Dinov2" if backbone.register_tokens is None else "Dinov2WithRegisters"
    p, width = b.patch_embed.patch_size, b.cls_token.shape[-1]
    sizes = {
        "patch_size": p,
        "image_size": round(b.patch_embed.num_patches**0.5) * p,
        "hidden_size": width,
    }
    sizes |= {"num_hidden_layers": len(b.blocks), "num_attention_heads": b.blocks[0].attn.num_heads}
    sizes |= {"num_register_tokens": b.num_prefix_tokens - 1, "layerscale_value": 1.0}
    model = getattr(transformers, kind + "Model")(getattr(transformers, kind + "Config")(**sizes))
    weights = {name: t for name, t in b.state_dict().items() if "pixel" not in name}
    for name in [name for name in weights if ".qkv." in name]:
        for part, t in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace("attn.qkv", f"attention.{part}_proj")] = t
    for old, new in NAMES:
        weights = {re.sub(old, new, name): t for name, t in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("lambda1" in name for name in missing)  # 1.0: no LayerScale
    return model.eval()


if __name__ == "__main__":
    to_transformers(dinov2.load_backbone(sys.argv[1])).save_pretrained(sys.argv[2])
