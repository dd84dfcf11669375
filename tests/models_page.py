"""docs/models.md from the families that the tests train: `python tests/models_page.py` writes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HEAD = """# Models

Made from the tests by `python tests/models_page.py`; a test checks that it is current. Every family below is trained by
`tests/model/` as a tiny random model of its real Hugging Face class, with LoRA, in fp32: two or three steps with
`share_prefix` on and off must give the same losses and gradient norms (relative 5e-5 and 1e-4). *Shared* means that one pass runs
a prompt with all its answers. A family that cannot share says so in one line and runs every answer as an ordinary sequence.
Last made with transformers {version}.

Any other causal language model, any other vision-language model that `AutoModelForImageTextToText` knows, and any model whose
code comes with it, whatever type it says it is, is checked before its first step: two groups in one pass, one of them that of the
longest prompt, against ordinary sequences. Where the log-probs differ by more than rounding, a warning says so and every
completion runs as its own sequence. Models whose tokens see what follows them, or whose logits are no linear function of the last
hidden states (with a scale or a softcap), are refused by name.
"""

NOTES = """## Fine print

* **Weights that the files hold quantised.** Those in fp8 and mxfp4 (gpt-oss) are loaded in full, as what runs them as they are gives no
  gradient; bitsandbytes' 4 bits stay and take LoRA. GPTQ, AWQ, int8 and all others are refused by name.
* **Image tokens.** A prompt has as many image tokens as the model's own processor gives images of their sizes, measured with blank
  images of these sizes, once for each different list of sizes. Images are never cut.
* **torchvision is not needed**, and changes nothing where it is installed. Images go through transformers' PIL image processors.
  Processors that also take videos (Qwen-VL, GLM-V, LLaVA-OneVision, LLaVA-NeXT-Video, SmolVLM, InternVL, Gemma 4, Ernie 4.5 VL) need
  torchvision for the videos alone and are loaded without them; what a run saves in `final/` names them again. Pixtral's processor, of
  Mistral 3 too, imports torchvision for one function and gets it from its PIL twin. Families without a PIL image processor (Cohere 2
  Vision, LFM2-VL, Molmo 2, Kimi, Perception LM) need torchvision: one line says so. SmolVLM's processor needs `num2words`.
* **Positions.** Where a family has positions on several axes (Qwen-VL), those of a prompt come from the model's own `get_rope_index`;
  every answer goes on behind the prompt's last position on every axis.
* **lora.targets: auto** is every linear layer of the language model except the head, none of the vision parts. Mixtures of experts
  keep their experts in one fused parameter per layer, which is no linear layer: `auto` leaves it alone and says so; name
  `experts.gate_up_proj` and `experts.down_proj` in a list to adapt it (peft's `target_parameters`; needs `lora.dropout: 0`).
  Mamba's `out_proj` and linears that peft takes for old names of fused experts (a shared expert's `gate_proj`) are left out too, and
  kinds of linears of which it could not load every adapter again (Mistral Large 4's `gate_proj`, `up_proj` and `down_proj`).
* **train_projector** knows `multi_modal_projector`, `connector`, `visual.merger` with `visual.deepstack_merger_list` or `visual.merger_list`, and a model's
  `aligner`, `projector`, `vision_projection`, `visual_embeddings_table`, `resampler_model`, `embed_vision`,
  `merger`, `layerwise_projectors` with `spatial_projectors`, or a tower's `patch_merger`: those of every family above, asked of each
  in the tests. It refuses a model that has none of them.
* **Qwen-Omni** is trained as what its files hold: a thinker saved by itself (`qwen2_5_omni_thinker`, `qwen3_omni_moe_thinker`), without
  sound; the whole model with its talker is refused.
* **Not taken with images**: encoder-decoders and models whose image part is no `vision_config` (Florence-2, Pix2Struct, Chameleon),
  refused by name, and GOT-OCR 2, whose processor takes the images of one page only.
* **Logits** are the model's own in transformers. Aya Vision's class applies no `logit_scale`, though its text configuration has one:
  TRL 1.16 applies it, so its figures differ there. Beside TRL's `DPOTrainer`, step by step, stand Llama, LLaVA-1.5, Qwen2.5-VL,
  LLaVA-NeXT, LLaVA-OneVision, Idefics3, InternVL, Gemma 3, Mistral 3, a Mixtral with its router's loss, and, unshared, Qwen3.5;
  TRL cannot run Mllama's batches.
* **Latent attention** (DeepSeek-V2 and V3, `glm4_moe_lite`, MiniCPM3), whose values are shorter than its keys, is filled up with zeros.
* **Mixtures of experts.** The router's load-balancing loss stands in `metrics.jsonl` as `aux_loss` for every family whose class in
  transformers has one, over all tokens of the step's sequences, two a pair: TRL's value, whatever is shared, packed or spread over
  ranks. `loss.router_aux_weight` adds it to the loss (TRL adds it by the model's own weight unless told otherwise); a step of several
  packs then runs each twice, for where the router sends a token depends on all others. Noise that routers add, or experts that they
  draw, in training mode are switched off, as dropout is.
* **Beginning of a prompt.** A prompt begins as the chat template says: llava-hf's LLaVA-1.5 writes no `<s>`, and gets none in TRL's
  DPOTrainer and in vLLM's chat either. transformers' processors put one in front of such a chat, and LLaVA was trained with one;
  `model.bos: tokenizer` does as they do, token for token. A note says which models are concerned. `fasttrain answer` and `eval`
  ask an adapter as its run was trained; for merged models there is `--bos`.
  PaliGemma has no chat template of its own, and its processor puts `<bos>` behind the images and a newline behind the question: write both
  into the template, for here, too, a prompt is what the template says. So with Molmo 2, whose processor puts `<bos>`, or the end-of-text
  token where its tokenizer has no `<bos>`, in front of a prompt that does not begin with it.
* **End of a prompt.** A generation prompt may end with what no answer, or not every one, is rendered behind: DeepSeek-R1's distilled
  models ask with `<think>` and render answers without it. A prompt then ends where the first of its answers leaves the generation prompt,
  token for token as in TRL 1.16, and answers that begin as the generation prompt ends continue it. A note names what may be left out, and
  another says so where a template leaves out what an answer says before `</think>`. `fasttrain answer` and `eval` ask with the whole
  generation prompt. A template that renders answers without anything of its generation prompt is refused.
* **Own code.** A model whose Python code comes with it is loaded with `model.trust_remote_code: true` only. `fasttrain answer`, `eval` and
  the merge of an adapter folder take `--trust-remote-code`, and nothing from the adapter's folder; a study's answers go by its recipe.
* **Reference cache.** With weights that are not fp32 the key also holds how attention was computed (the shared backend, or unshared):
  rounding differs by more than a first step's check allows.
* **tflops, mfu** count the vision tower only where images have one size (LLaVA-1.5); in other families they leave it out.
"""


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def models_page(version: str) -> str:
    tests = Path(__file__).parent
    vision = load("tiny_families", tests / "tiny_families.py")
    text = load("text_families", tests / "model" / "test_families.py")
    lines = [
        HEAD.format(version=version),
        "## With images",
        "",
        "| family | prompts | remarks |",
        "|---|---|---|",
    ]
    lines.append("| LLaVA-1.5 | shared | CLIP and SigLIP towers; Llama, Qwen2 and Gemma 2 decoders |")
    for name, build in vision.FAMILIES.items():
        reason = vision.UNSHARED.get(name)
        remark = (build.__doc__ or "").split(": ", 1)[-1].rstrip(".")
        lines.append(f"| {name} | {'ordinary: ' + reason if reason else 'shared'} | {remark} |")
    lines += ["", "## Text only", "", "| decoder | prompts |", "|---|---|"]
    for name, (_, reason) in text.FAMILIES.items():
        lines.append(f"| {name} | {'ordinary: ' + reason if reason else 'shared'} |")
    return "\n".join([*lines, "", NOTES])


if __name__ == "__main__":
    import transformers

    page = Path(__file__).parent.parent / "docs" / "models.md"
    page.write_text(models_page(transformers.__version__), encoding="utf-8")
    print(f"{page} written")
