"""Fine-tunes a TrOCR checkpoint on line pictures with transformers' Seq2SeqTrainer.

    python examples/fine_tune/trainer.py TRAIN HELD_OUT OUT [--model DIR_OR_ID]

`predict_with_generate` calls `model.generate`, which `accelerate` lets run on the engine: nothing else changes.
"""

import tempfile

import jiwer
import numpy as np
from lines import IGNORED, Lines, arguments, collate, load
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments

from trocr_fast import accelerate


def main() -> None:
    args = arguments(__doc__)

    processor, model = load(args.model)
    max_tokens = model.config.decoder.max_position_embeddings
    train, held_out = (Lines(source, processor, max_tokens) for source in (args.train, args.held_out))
    accelerate(model)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        tokens = np.where(prediction.predictions == IGNORED, model.config.pad_token_id, prediction.predictions)
        return {"cer": jiwer.cer(held_out.texts, processor.batch_decode(tokens, skip_special_tokens=True))}

    with tempfile.TemporaryDirectory() as work:
        settings = Seq2SeqTrainingArguments(
            output_dir=work,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            predict_with_generate=True,
            generation_max_length=max_tokens,
            report_to=[],
        )
        trainer = Seq2SeqTrainer(
            model,
            settings,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processor,  # saved beside the model
            compute_metrics=compute_metrics,
        )
        print(f"before: CER {trainer.evaluate()['eval_cer']:.2%}", flush=True)
        trainer.train()
        rates = [row["eval_cer"] for row in trainer.state.log_history if "eval_cer" in row]
        print(f"after: CER {rates[-1]:.2%}")
        trainer.save_model(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
