"""Two blocks of Stable Diffusion's kind, so that a count from shapes takes a moment."""

from cntlora_core.model.families import config_of

SMALL_UNET = config_of("sd1")["unet"] | {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
