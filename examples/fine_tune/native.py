"""Fine-tunes a TrOCR checkpoint on line pictures in a plain PyTorch loop.

    python examples/fine_tune/native.py TRAIN HELD_OUT OUT [--model DIR_OR_ID]

After each epoch the engine reads the held-out lines with the weights as they then are.
"""

import jiwer
import torch
from lines import Lines, arguments, collate, load
from torch.utils.data import DataLoader
from transformers import TrOCRProcessor, VisionEncoderDecoderModel

from trocr_fast import accelerate


def character_error_rate(
    model: VisionEncoderDecoderModel, processor: TrOCRProcessor, lines: Lines, batch_size: int
) -> float:
    model.eval()
    texts: list[str] = []
    for batch in DataLoader(lines, batch_size, collate_fn=collate):
        pixel_values = batch["pixel_values"].to(model.device)
        tokens = model.generate(pixel_values, max_length=model.config.decoder.max_position_embeddings)
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return jiwer.cer(lines.texts, texts)


def train_epoch(
    model: VisionEncoderDecoderModel,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Mean loss of the epoch's batches, in nats a token."""
    model.train()
    losses = []
    for batch in loader:
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def main() -> None:
    args = arguments(__doc__)

    torch.manual_seed(0)
    processor, model = load(args.model)
    max_tokens = model.config.decoder.max_position_embeddings
    train, held_out = (Lines(source, processor, max_tokens) for source in (args.train, args.held_out))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    accelerate(model)
    print(f"before: CER {character_error_rate(model, processor, held_out, args.batch_size):.2%}", flush=True)

    loader = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.epochs * len(loader))
    for epoch in range(1, args.epochs + 1):
        loss = train_epoch(model, loader, optimizer, schedule)
        cer = character_error_rate(model, processor, held_out, args.batch_size)
        print(f"epoch {epoch}: loss {loss:.4f}, CER {cer:.2%}", flush=True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
