"""The model classes that llama.cpp's conversion knows, and what becomes of an adapter of each.

python -m tests.support.llama_cpp_classes        # a line for each class
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from adapterhub_converters.architectures import architecture_lookup
from tests.support import llama_cpp_scripts

REFUSED: dict[str, tuple[str, ...]] = {
    "an encoder, or an encoder with a decoder": (
        "BertForMaskedLM", "BertForSequenceClassification", "BertModel", "CamembertModel", "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification", "DistilBertModel", "EuroBertModel", "Gemma3TextModel",
        "InternVisionModel", "JinaBertForMaskedLM", "JinaBertModel", "JinaEmbeddingsV5Model",
        "Lfm2BidirectionalModel", "LlamaBidirectionalModel", "MT5ForConditionalGeneration", "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification", "ModernBertModel", "NeoBERT", "NeoBERTForSequenceClassification",
        "NeoBERTLMHead", "NomicBertModel", "PaddleOCRVisionModel", "RADIOModel", "RobertaForSequenceClassification",
        "RobertaModel", "T5EncoderModel", "T5ForConditionalGeneration", "T5WithLMHeadModel",
        "UMT5ForConditionalGeneration", "UMT5Model", "XLMRobertaForSequenceClassification", "XLMRobertaModel",
    ),
    "a draft model, a tokenizer, or another part of a model": (
        "DFlash2DraftModel", "DFlashDraftModel", "DSparkDraftModel", "DSparkSpeculator", "DeepseekOCR2ForCausalLM",
        "DeepseekV4DSparkModel", "Eagle3DraftModel", "Eagle3LlamaForCausalLM", "Eagle3Speculator",
        "Gemma4AssistantForCausalLM", "Gemma4DSparkModel", "Gemma4UnifiedAssistantForCausalLM", "GlmasrModel",
        "Granite4VisionForConditionalGeneration", "GraniteSpeechForConditionalGeneration",
        "GraniteSpeechPlusForConditionalGeneration", "Lfm25AudioTokenizer", "Lfm2AudioForConditionalGeneration",
        "Lfm2DSparkDraftModel", "LingDSparkModel", "LlamaForCausalLMEagle3", "MERaLiON2ForConditionalGeneration",
        "MiniMaxM3VLForConditionalGeneration", "MuseGlimmerAssistantModel", "NemotronH_Nano_VL_V2", "PocketTTSModel",
        "Qwen3DSparkModel", "Qwen3TTSForConditionalGeneration", "UltravoxModel", "WavTokenizerDec",
    ),
    "latent attention, where llama.cpp bypasses adapters": (
        "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "Dots3NoteForCausalLM",
        "Dots3NoteForConditionalGeneration", "Dots3NoteTextForCausalLM", "Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM", "HYV4ForCausalLM", "KimiK25ForConditionalGeneration",
        "KimiVLForConditionalGeneration", "MiniCPM3ForCausalLM", "PLMForCausalLM", "YoutuForCausalLM",
        "YoutuVLForConditionalGeneration",
    ),
    "its code is not in transformers, and nothing here could be compared with it": (
        "ArcticForCausalLM", "BaiChuanForCausalLM", "BaichuanForCausalLM", "BailingMoeForCausalLM",
        "BailingMoeV2ForCausalLM", "BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration",
        "BitnetForCausalLM", "ChameleonForCausalLM", "ChatGLMForConditionalGeneration", "ChatGLMModel",
        "CodeShellForCausalLM", "CogVLMForCausalLM", "DeciLMForCausalLM", "DeepseekForCausalLM",
        "DreamModel", "ExaoneForCausalLM", "GPTRefactForCausalLM",
        "Glm5vForConditionalGeneration", "GraniteSwitchForCausalLM", "Grok1ForCausalLM", "GrokForCausalLM",
        "GroveMoeForCausalLM", "InternLM2ForCausalLM", "JAISLMHeadModel", "KimiK3ForConditionalGeneration",
        "LFM2ForCausalLM", "LLaDAMoEModel", "LLaDAMoEModelLM", "LLaDAModelLM", "LlavaStableLMEpochForCausalLM",
        "MPTForCausalLM", "MaincoderForCausalLM", "MambaLMHeadModel", "MapleForCausalLM", "MiMoV2ForCausalLM",
        "MiniCPMForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxM3SparseForCausalLM", "MiniMaxText01ForCausalLM",
        "NanbeigeForCausalLM", "NemotronHPuzzleForCausalLM", "OLMoForCausalLM", "OpenELMForCausalLM",
        "OrionForCausalLM", "PLaMo2ForCausalLM", "PLaMo3ForCausalLM", "PanguEmbeddedForCausalLM", "Phi4ForCausalLMV",
        "PhiMoEForCausalLM", "Plamo2ForCausalLM", "Plamo3ForCausalLM", "PlamoForCausalLM", "QWenLMHeadModel", "RND1",
        "RWForCausalLM", "RWKV6Qwen2ForCausalLM", "RWKV7ForCausalLM", "RuGPT3XLForCausalLM", "Rwkv6ForCausalLM",
        "Rwkv7ForCausalLM", "RwkvHybridForCausalLM", "Sarashina2VisionForCausalLM", "SarvamMoEForCausalLM",
        "SmallThinkerForCausalLM", "Spark2_5ForCausalLM", "Step3p5ForCausalLM", "StepVLForConditionalGeneration",
        "TalkieForCausalLM", "UnlimitedOCRForCausalLM", "XverseForCausalLM", "modeling_grove_moe.GroveMoeForCausalLM",
        "modeling_sarvam_moe.SarvamMoEForCausalLM",
    ),
    "not compared with llama.cpp yet": (
        "BitNetForCausalLM", "ChameleonForConditionalGeneration", "DbrxForCausalLM", "Dots1ForCausalLM",
        "Exaone4_5_ForConditionalGeneration", "FalconH1ForCausalLM", "Gemma4UnifiedForConditionalGeneration",
        "Glm5NextForConditionalGeneration", "HrmTextForCausalLM", "HunYuanMoEV1ForCausalLM",
        "JanusForConditionalGeneration", "KimiLinearForCausalLM", "KimiLinearModel", "Mamba2ForCausalLM",
        "MiMoV2FlashForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "MuseGlimmerForConditionalGeneration",
        "Qwen2VLModel", "Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration", "Step3p7ForConditionalGeneration",
    ),
}  # fmt: skip
"""Reason why adapters of a class are refused, to the classes. `merge --into` and a conversion of the result work for them."""


def registered(scripts: Path) -> dict[str, str]:
    """Map each class that llama.cpp converts to the Python class that does it, read from the source without running it."""
    files = [*sorted((scripts / "conversion").glob("*.py")), scripts / "convert_hf_to_gguf.py"]
    return dict(pair for file in files for pair in _registrations(ast.parse(file.read_text())))


def _registrations(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register":
                names = (name.value for name in call.args if isinstance(name, ast.Constant))
                yield from ((str(name), node.name) for name in names)


def converted() -> frozenset[str]:
    """Return the classes of which adapters are converted."""
    return frozenset(name for row in architecture_lookup.ADAPTERS for name in (*row.classes, *row.wrapped))


if __name__ == "__main__":
    reasons = {name: reason for reason, names in REFUSED.items() for name in names}
    for class_name, converter in sorted(registered(llama_cpp_scripts.downloaded()).items()):
        verdict = "converted" if class_name in converted() else f"refused: {reasons.get(class_name, 'no row yet')}"
        print(f"{class_name}\t{converter}\t{verdict}")
