"""What a training run is told, checked once."""

import dataclasses

from portable.checks import ConfigError

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Options of a run; every one of `trajectory()` changes the losses, the others only what is written when.

    Attributes:
      steps: optimizer steps of the whole run.
      batch_size: windows a step.
      length: tokens a window.
      accumulate: microbatches a step is computed in; divides batch_size.
      learning_rate: peak of the schedule.
      warmup: steps of linear warm-up.
      schedule: "cosine" or "linear" decay to the end; "wsd" stays at the peak and decays linearly over the
        last fifth; "constant" stays.
      final_fraction: learning rate at the end, as a fraction of the peak.
      weight_decay: decoupled decay of matrices and embeddings (not of norms, biases, A_log, D, dt_bias).
      beta1, beta2, epsilon: AdamW's.
      bias_rate: step of the biases that balance the loads of experts (`portable.ops.updated_bias`), in a model that
        has them.
      clip: bound on the global gradient norm; 0 for none.
      seed: of the random weights and of the order of the windows.
      eval_every: steps between held-out evaluations; 0 for one at the end.
      eval_bytes: held-out bytes looked at each time.
      log_every: steps between fetches of the losses from the device.
      checkpoint_every: steps between checkpoints.
    """

    steps: int = 1000
    batch_size: int = 8
    length: int = 512
    accumulate: int = 1
    learning_rate: float = 3e-3
    warmup: int = 100
    schedule: str = "cosine"
    final_fraction: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    bias_rate: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 100
    eval_bytes: int = 65536
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self):
        positive = ("steps", "batch_size", "length", "accumulate", "learning_rate", "epsilon", "eval_bytes")
        positive += ("log_every", "checkpoint_every")
        for name in positive:
            self._rule(name, getattr(self, name) > 0, "must be positive")
        for name in ("warmup", "weight_decay", "bias_rate", "clip", "eval_every", "seed"):
            self._rule(name, getattr(self, name) >= 0, "must not be negative")
        self._rule("seed", self.seed < 2**32, "must be below 2**32")
        for name in ("beta1", "beta2"):
            self._rule(name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")
        self._rule("final_fraction", 0 <= self.final_fraction <= 1, "must be between 0 and 1")
        self._rule("schedule", self.schedule in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}")
        self._rule("accumulate", self.batch_size % self.accumulate == 0, f"must divide batch_size {self.batch_size}")
        self._rule("warmup", self.warmup <= self.steps, f"must not exceed the {self.steps} steps")

    def _rule(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"training option {name} {rule}, got {getattr(self, name)!r}.")

    def trajectory(self) -> dict:
        """The options that a resumed run must share with the run it continues."""
        free = ("eval_every", "eval_bytes", "log_every", "checkpoint_every")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
