"""What TensorBoard's page of custom scalars shows, in the order in which a run is judged."""

from __future__ import annotations

_PREFERS = "1b. Does it prefer?"

# Question -> chart -> tags, as regular expressions.
QUESTIONS: dict[str, dict[str, list[str]]] = {
    "1. Is it learning?": {
        "loss, trained and held out": ["^loss$", "^held_out_loss$"],
        "held-out loss by source": ["^held_out_loss_by_source/.*"],
        "loss by source": ["^loss_by_source/.*"],
        "learning rate": ["^learning_rate.*"],
    },
    _PREFERS: {
        "pairs in the right order": ["^preference/accuracy$"],
        "rewards: margin, chosen, rejected": ["^preference/(margin|chosen_reward|rejected_reward)$"],
        "log-probability of the answers": ["^preference/(chosen|rejected)_log_prob$"],
        "of the chosen ones, nats a label on the reference": ["^preference/chosen_log_ratio$"],
        "distance from the reference": ["^preference/kl$"],
    },
    "2. Is it healthy?": {
        "gradient norm, before clipping": ["^grad_norm$"],
        "steps and samples skipped": ["^step_skipped$", "^skipped_steps$", "^data/samples_(skipped|dropped)$"],
        "GiB of memory, largest of the ranks": ["^memory/.*"],
    },
    "3. Is it fast?": {
        "tokens a second": ["^tokens_per_s$"],
        "MFU": ["^mfu$"],
        "TFLOP/s of a rank": ["^tflops_per_s_per_rank$"],
        "seconds of a step": ["^time/step_s$"],
        "of these, the model": ["^time/(vision|forward|backward|optimizer)_s$"],
        "of these, around it": ["^time/(data_wait|exchange|save|held_out|other)_s$"],
        "share of the time waiting for data": ["^data_wait_share$"],
        "slow ranks: largest and median": ["^ranks/.*"],
        "seconds of a checkpoint": ["^checkpoint/.*_s$"],
    },
    "4. Is the data right?": {
        "epochs of each source": ["^epochs_by_source/.*"],
        "tokens of each source": ["^tokens_by_source/.*"],
        "share of visual tokens, padding and dummies": [
            "^data/visual_token_share$",
            "^data/padding_share$",
            "^data/dummy_share$",
        ],
        "documents of a sequence": ["^data/documents_per_sequence$"],
        "tiles of a rank, mean and largest": ["^data/tiles_per_rank_.*"],
    },
}


PREFERENCE_CHARTS = tuple(QUESTIONS[_PREFERS])


def custom_scalars(without: tuple[str, ...] = ()) -> dict[str, dict[str, list]]:
    """QUESTIONS as SummaryWriter.add_custom_scalars takes them. Args: without: charts to leave out."""
    kept = {
        question: {title: ["Multiline", tags] for title, tags in charts.items() if title not in without}
        for question, charts in QUESTIONS.items()
    }
    return {question: charts for question, charts in kept.items() if charts}
