"""The small model and its processor: a standard VisionEncoderDecoderModel whose tokens are characters."""

import math

import torch
from text import ALPHABET
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
BOS, PAD, EOS, UNK = range(4)
VOCABULARY = {token: index for index, token in enumerate(SPECIAL + list(ALPHABET))}
IMAGE_SIZE = (48, 768)  # height, width
PATCH_SIZE = (48, 6)  # a column of the whole height, so the tokens run along the line
MAX_POSITIONS = 128
MAX_LENGTH = 96  # tokens that generate() may write, start and end included


def build(
    width: int, encoder_layers: int, decoder_layers: int, heads: int, image_size: tuple[int, int] | None = None
) -> VisionEncoderDecoderModel:
    """A new model of pictures of `image_size`, by default IMAGE_SIZE, in columns as wide as PATCH_SIZE.

    Its position tables start as sinusoids: neighbours look alike from the first step.
    """
    height, columns = image_size or IMAGE_SIZE
    encoder = ViTConfig(
        image_size=[height, columns],
        patch_size=[height, PATCH_SIZE[1]],
        hidden_size=width,
        num_hidden_layers=encoder_layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        qkv_bias=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
    decoder = TrOCRConfig(
        vocab_size=len(VOCABULARY),
        d_model=width,
        decoder_layers=decoder_layers,
        decoder_attention_heads=heads,
        decoder_ffn_dim=4 * width,
        activation_function="gelu",
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=0.05,
        use_cache=True,
        scale_embedding=False,
        use_learned_position_embeddings=True,
        layernorm_embedding=True,
        tie_word_embeddings=True,
        cross_attention_hidden_size=width,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = EOS, PAD, EOS
    model = VisionEncoderDecoderModel(config=config)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        max_length=MAX_LENGTH,
        use_cache=True,
    )
    with torch.no_grad():
        embeddings = model.encoder.embeddings
        embeddings.position_embeddings.copy_(0.5 * sinusoids(embeddings.position_embeddings.shape[1], width))
        positions = model.decoder.model.decoder.embed_positions.weight  # [positions + 2, width]
        positions.copy_(0.05 * sinusoids(*positions.shape))
    return model


def sinusoids(count: int, width: int) -> torch.Tensor:
    """[count, width]: sines and cosines of the position, wavelengths from 6 to 600 positions."""
    wavelengths = 6.0 * 100.0 ** (torch.arange(width // 2) / (width // 2))
    angles = torch.arange(count)[:, None] * (2 * math.pi / wavelengths)  # [count, width / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def start_from(model: VisionEncoderDecoderModel, trained: dict[str, torch.Tensor]) -> None:
    """Give a new model the weights of one trained on a smaller rectangle: same width and layers, same column width.

    The patch projection is stretched to the new height, its sum kept; columns that the old model never had keep the
    sinusoids they start with. Raises RuntimeError where any other shape differs.
    """
    state = dict(trained)
    name = "encoder.embeddings.patch_embeddings.projection.weight"  # [width, 3, height, columns]
    old, new = state[name], model.state_dict()[name]
    stretched = torch.nn.functional.interpolate(old, size=new.shape[2:], mode="bilinear", align_corners=False)
    state[name] = stretched * (old.shape[2] * old.shape[3] / (new.shape[2] * new.shape[3]))
    name = "encoder.embeddings.position_embeddings"  # [1, 1 + columns, width]
    table = model.state_dict()[name].clone()
    table[:, : state[name].shape[1]] = state[name]
    state[name] = table
    model.load_state_dict(state)


def processor() -> TrOCRProcessor:
    """Squash to the rectangle, bilinear, -1 to 1; one token a character."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    height, width = IMAGE_SIZE
    pictures = ViTImageProcessor(
        do_resize=True,
        size={"height": height, "width": width},
        resample=2,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=None,
    )
    return TrOCRProcessor(image_processor=pictures, tokenizer=fast)


def encode(text: str) -> list[int]:
    """Token ids of the characters, without start and end."""
    return [VOCABULARY[character] for character in text]


def decode(ids: list[int]) -> str:
    """The text of token ids; special tokens write nothing."""
    return "".join(ALPHABET[i - len(SPECIAL)] for i in ids if i >= len(SPECIAL))
