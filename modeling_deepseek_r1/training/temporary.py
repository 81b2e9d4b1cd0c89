"""Training of a task's temporary experts alone."""

from transformers import TrainerCallback

from ..moe.temporary import TemporaryExperts, train_temporary_only


class TemporaryTraining(TrainerCallback):
    """Lets any Trainer train the temporary experts of a model (`moe/temporary.py`) and leave everything else as it is.

    Give it to the Trainer with the model: parameters are frozen when training begins.

    Raises:
        ValueError: when training begins, with weight decay, which would move what has no gradient.
    """

    def __init__(self, temporary: TemporaryExperts):
        self.temporary = temporary
        self._hooks: list = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.weight_decay:
            raise ValueError(
                f"TemporaryTraining: weight_decay={args.weight_decay} would move the other experts too; set it to 0"
            )
        self._hooks = train_temporary_only(model, self.temporary)

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
