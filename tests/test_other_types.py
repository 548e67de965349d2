"""Which of LeRobot's other policy types work through the door with `--craft.capture` alone, at small size, without
weights from a hub. What the guide "A policy of your own" says of them is this list."""
from pathlib import Path

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature

from craft_nb import zoo  # noqa: F401  it makes resnet_small known
from craft_nb.builder import anchor_batch_targets, draw_seeds
from craft_nb.losses import make_views
from craft_nb.policies import RowDrawsError, adapter_for
from craft_nb.trainer import AnchorPass

STATE, ACTION, IMAGE = "observation.state", "action", "observation.images.front"
FEATURES = dict(input_features={STATE: PolicyFeature(FeatureType.STATE, (4,)),
                                IMAGE: PolicyFeature(FeatureType.VISUAL, (3, 32, 32))},
                output_features={ACTION: PolicyFeature(FeatureType.ACTION, (4,))}, device="cpu", push_to_hub=False)
OTHERS = ("multi_task_dit", "vqbet", "xvla", "groot", "wall_x", "evo1", "molmoact2")


def seen(b, steps, horizon, words=False):
    gen = torch.Generator().manual_seed(0)
    batch = {STATE: torch.randn(b, steps, 4, generator=gen), IMAGE: torch.rand(b, steps, 3, 32, 32, generator=gen),
             ACTION: torch.randn(b, horizon, 4, generator=gen),
             "action_is_pad": torch.zeros(b, horizon, dtype=torch.bool)}
    if words:
        batch |= {"observation.language.tokens": torch.randint(1, 30, (b, 6), generator=gen),
                  "observation.language.attention_mask": torch.ones(b, 6, dtype=torch.bool)}
    return batch


def holds(policy, module, batch):
    "First loss 0, whatever batch an anchor stands in."
    adapter, views = adapter_for(policy, module), make_views(["answer"])
    b = len(batch[ACTION])
    rows = anchor_batch_targets(policy, batch, views, "dataset", seeds=draw_seeds(0, range(b)), adapter=adapter)
    for which in (list(range(b)), [b - 1], [1, 0]):
        loss = AnchorPass(adapter, views, {k: v[which] for k, v in rows.items()})(policy)["answer"]
        assert loss.requires_grad and loss.item() <= 1e-6
    return rows["answer"].shape


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_multi_task_dit(tmp_path, objective):
    from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    eyes, words = tmp_path / "clip-eyes", tmp_path / "clip-words"
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=32, patch_size=16)).save_pretrained(eyes)
    CLIPTextModel(CLIPTextConfig(**size, vocab_size=32, max_position_embeddings=8, pad_token_id=0, bos_token_id=1,
                                 eos_token_id=2)).save_pretrained(words)
    policy = MultiTaskDiTPolicy(MultiTaskDiTConfig(
        **FEATURES, objective=objective, vision_encoder_name=str(eyes), text_encoder_name=str(words),
        image_crop_shape=None, n_obs_steps=2, horizon=8, n_action_steps=4, hidden_dim=32, num_layers=1, num_heads=2,
        timestep_embed_dim=16, num_train_timesteps=10, tokenizer_max_length=6))
    with torch.no_grad():
        for p in policy.noise_predictor.parameters(): p.add_(0.1 * torch.randn_like(p))  # its last layer begins at zero
    assert holds(policy, "noise_predictor", seen(4, 2, 8, words=True)) == (4, 2, 8, 4)


def test_vqbet_is_refused():
    "It samples codes for all steps of all anchors in one draw, so what it says of an anchor hangs on the batch."
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
    from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy
    torch.manual_seed(0)
    policy = VQBeTPolicy(VQBeTConfig(**FEATURES, vision_backbone="resnet_small", pretrained_backbone_weights=None,
                                     crop_shape=None, n_obs_steps=2, n_action_pred_token=2, action_chunk_size=3,
                                     gpt_n_layer=1, gpt_n_head=2, gpt_hidden_dim=32, gpt_input_dim=32,
                                     gpt_output_dim=32, vqvae_enc_hidden_dim=16, vqvae_embedding_dim=16,
                                     spatial_softmax_num_keypoints=4, use_group_norm=True))
    policy.vqbet.action_head.vqvae_model.discretized.fill_(True)
    batch = seen(4, 2, 5)
    with pytest.raises(RowDrawsError, match="no row for each of"): holds(policy, "vqbet.policy", batch)
    policy.vqbet.action_head.vqvae_model.discretized.fill_(False)
    with pytest.raises(ValueError, match="called 0 times"): holds(policy, "vqbet.policy", batch)


def test_the_guide_lists_them():
    from lerobot.configs.policies import PreTrainedConfig
    guide = (Path(__file__).parents[1] / "nbs" / "guides" / "own_policy.ipynb").read_text()
    known = set(PreTrainedConfig.get_known_choices())
    assert known >= set(OTHERS) and all(f"| `{name}` |" in guide for name in OTHERS)
