"""The examples on transformers' documentation page of TrOCR, with an accelerated model."""

import copy
from pathlib import Path

import torch
from transformers import (
    TrOCRConfig,
    TrOCRForCausalLM,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from tests.drop_in.calls import builtin, fallbacks_of, outcome, sample_line
from tests.parity.models import Case, build, pictures
from trocr_fast import accelerate


def test_documentation_of_configuration() -> None:
    configuration = TrOCRConfig(vocab_size=50, d_model=32, decoder_layers=2, decoder_attention_heads=4)
    decoder = TrOCRForCausalLM(configuration)
    assert decoder.config.hidden_size == 32 and decoder.config.model_type == "trocr"
    encoder = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, configuration)
    assert both.decoder.is_decoder and both.decoder.add_cross_attention
    model = VisionEncoderDecoderModel(
        encoder=ViTModel(encoder), decoder=TrOCRForCausalLM(TrOCRConfig(**configuration.to_dict()))
    )
    model.eval()
    model.generation_config.decoder_start_token_id = 2
    reference = copy.deepcopy(model)
    accelerate(model, unsupported="raise")
    some = torch.randn(2, 3, 32, 32)
    assert outcome(model, some, max_length=8) == outcome(reference, some, max_length=8)


def test_documentation_of_inference(tmp_path: Path) -> None:
    """Processor, a training step, generate, and decoding, in the words of the page."""
    processor, plain = builtin()
    model = copy.deepcopy(plain)
    accelerate(model)
    image = sample_line()
    pixel_values = processor(image, return_tensors="pt").pixel_values

    model.config.decoder_start_token_id = processor.tokenizer.eos_token_id
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    model.config.vocab_size = model.config.decoder.vocab_size
    labels = processor.tokenizer("hello world", return_tensors="pt").input_ids
    loss = model(pixel_values=pixel_values, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and model.decoder.output_projection.weight.grad is not None

    generated_ids, fallbacks = fallbacks_of(lambda: model.generate(pixel_values))
    assert torch.equal(generated_ids, plain.generate(pixel_values)) and not fallbacks
    generated_text = processor.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert generated_text == processor.decode(generated_ids[0], skip_special_tokens=True) and generated_text

    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = TrOCRProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(image, return_tensors="pt").pixel_values, pixel_values)
    both = again(images=image, text="hello", return_tensors="pt")
    assert {"pixel_values", "labels"} <= both.keys()


def test_documentation_of_the_decoder() -> None:
    """`TrOCRForCausalLM` forward, inside an accelerated model: nothing there has changed."""
    model = copy.deepcopy(build(Case("A"), 0))
    accelerate(model)
    tokens = torch.tensor([[2, 5, 6], [2, 7, 8]])
    out = model.decoder(
        input_ids=tokens,
        encoder_hidden_states=torch.randn(2, 17, 24),
        labels=tokens,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert out.loss.isfinite() and out.logits.shape == (2, 3, 14)
    assert len(out.attentions) == len(out.cross_attentions) == 2 and len(out.hidden_states) == 3
    whole = model(pictures(model, 2, 0), decoder_input_ids=tokens, output_attentions=True, output_hidden_states=True)
    assert whole.cross_attentions[0].shape == (2, 4, 3, 17) and whole.encoder_hidden_states is not None
