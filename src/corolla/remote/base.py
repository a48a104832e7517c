"""What the distributed models of all families share: embeddings, norm, head and soft prompts here, the blocks elsewhere.

They are mixed into transformers' own classes, which bring configurations, heads, losses and `generate`.

Legend: S sequences, N columns, P soft tokens, E hidden, B blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from corolla.errors import InvalidSetting
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Checkpoint, Progress
from corolla.models.families import architecture
from corolla.models.span import DTYPES
from corolla.remote.cache import RemoteCache
from corolla.remote.calls import Calls
from corolla.remote.opening import open_blocks
from corolla.remote.prompts import SoftPrompts, TuningMode, soft_prompts
from corolla.remote.sequential import RemoteSequential
from corolla.remote.servers import RemoteConfig
from corolla.remote.session import InferenceSession
from corolla.types import Span


class Distributed(PreTrainedModel):
    """A model whose blocks are computed by servers, with a head or without.

    Its own weights are frozen; what is trained are soft prompts, where it has any, and a classifier's head. `close` it, or let it go.
    """

    supports_gradient_checkpointing = False  # nothing is computed here that could be checkpointed
    made_here: ClassVar[tuple[str, ...]] = ()  # weights that are trained, and drawn at random where a checkpoint lacks them
    _closing: Callable[[], object]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        initial_peers: Sequence[str] = (),
        secret: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        tuning_mode: TuningMode | None = None,
        pre_seq_len: int = 16,
        num_labels: int | None = None,
        progress: Progress | None = None,
        **servers: Any,
    ) -> Any:
        """The model `name`, an alias, a directory or a hub id: of its tensors only the embeddings, norms and the head are read.

        Args:
            initial_peers: multiaddrs of a swarm; without any the blocks are computed in this process.
            secret: of the swarm.
            torch_dtype, dtype: either name; what is computed here, and in this process, in. By default what the checkpoint says.
            tuning_mode: "ptune" puts `pre_seq_len` soft tokens in front, "deep_ptune" at every block too.
            num_labels: of a classifier; by default what the checkpoint says.
            servers: `RemoteConfig`'s settings: allowed_servers, blocked_servers, request_timeout, max_retries...

        Raises:
            ModelNotFound, CheckpointError, UnsupportedModel, InvalidSetting, NetworkError: as their sentences say.
        """
        settings = _settings(servers)
        directory = resolve(str(name), progress=progress)
        with Checkpoint(directory) as checkpoint:
            config = checkpoint.config
            assert cls.config_class is not None, "a family names its configuration"
            family = cls.config_class.model_type
            if config.model_type != family:
                raise InvalidSetting("model", f"{name} is a {config.model_type} model, and {cls.__name__} is for {family}")
            blocks, computed_in = architecture(config).blocks, _dtype(dtype or torch_dtype, config)
            if num_labels is not None:
                config.num_labels = num_labels
            with torch.device("meta"):
                model = cls(config)
            model._load(checkpoint, computed_in)
        if model.can_generate() and (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in cls.made_here)
        model.name_or_path = config.name_or_path = str(name)
        if tuning_mode is not None:
            model.bare.prompts = soft_prompts(tuning_mode, pre_seq_len, cast(torch.Tensor, model.get_input_embeddings().weight), blocks)
        opened = open_blocks(
            directory,
            blocks,
            computed_in,
            initial_peers=initial_peers,
            secret=None if secret is None else secret.encode(),
            config=settings,
        )
        model.connect(opened.calls)
        model._closing = weakref.finalize(model, opened.close)
        return model.eval()

    @property
    def bare(self) -> DistributedModel:
        """The model without its head."""
        return cast(DistributedModel, self.base_model)

    def connect(self, calls: Calls) -> None:
        """Compute the blocks through `calls` from now on."""
        setattr(self.bare, self.bare.blocks_name, RemoteSequential(calls, Span(0, architecture(self.config).blocks)))

    def close(self) -> None:
        """Leave the swarm, or free what this process keeps of the blocks. Closing twice is no error."""
        self._closing()

    def inference_session(self, *, max_length: int | None = None) -> InferenceSession:
        """A session of this model and its soft prompts, for `generate(..., session=...)`; a context manager.

        Args:
            max_length: columns that it may come to, soft tokens not counted; the model's context by default.
        """
        prompts, context = self.bare.prompts, architecture(self.config).context_length
        prefix = 0 if prompts is None else len(prompts)
        deep = None if prompts is None or prompts.deep is None else prompts.deep.detach()
        most = context if max_length is None else min(context, max_length + prefix)
        blocks = self.bare.blocks
        return InferenceSession(blocks.calls, blocks.span, max_length=most, prompts=deep, prefix=prefix)

    def _load(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Read what is on the meta device. A checkpoint's names may have the base model's prefix or not, whether ours do or not."""
        prefix = f"{self.base_model_prefix}."
        tensors = {}
        for name, parameter in self.named_parameters():
            spellings = name, name.removeprefix(prefix), prefix + name
            stored = next((spelling for spelling in spellings if checkpoint.has(spelling)), name)
            if name in self.made_here and not checkpoint.has(stored):
                tensors[name] = torch.empty(parameter.shape, dtype=dtype).normal_(std=self.config.initializer_range)
            else:
                tensors[name] = checkpoint.tensor(stored, dtype, shape=tuple(parameter.shape))
        self.load_state_dict(tensors, strict=False, assign=True)  # what is tied to another tensor is not among them
        self.tie_weights()


class DistributedModel(Distributed):
    """A base model, without a head. `blocks_name` is where the family keeps its blocks."""

    blocks_name: ClassVar[str]
    prompts: SoftPrompts | None

    def entering(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What enters the first block [S, N, E]."""
        return embeddings

    def leaving(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm [S, N, E]."""
        raise NotImplementedError

    @property
    def blocks(self) -> RemoteSequential:
        """All of the model's blocks."""
        blocks: RemoteSequential = getattr(self, self.blocks_name)
        return blocks

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **ignored: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As transformers', with `past_key_values` a `RemoteCache`. Positions count the columns that are no padding, as the
        attention mask [S, N] says: other `position_ids` are refused.

        Soft prompts stand in front of a new session, and of every input without one; the output leaves them out.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidSetting("input_ids", "give them or inputs_embeds, and not both")
        if past_key_values is not None and not isinstance(past_key_values, RemoteCache):
            raise InvalidSetting("past_key_values", "caches lie at the servers: generate with model.generate(..., session=...)")
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        _check_positions(position_ids, attention_mask, past_key_values, embeddings.shape[1])
        session = None if past_key_values is None else past_key_values.session
        if session is not None and attention_mask is not None:
            attention_mask = attention_mask[:, -embeddings.shape[1] :]
        if past_key_values is not None and session is not None and 0 < session.sequences < len(embeddings):
            past_key_values.batch_repeat_interleave(len(embeddings) // session.sequences)  # beams begin
        width, deep = 0, None if self.prompts is None else self.prompts.deep
        if self.prompts is not None and (session is None or not session.position):
            width = len(self.prompts)
            soft = self.prompts.tokens.to(embeddings).expand(len(embeddings), -1, -1)
            embeddings = torch.cat([soft, embeddings], 1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask.new_ones(len(embeddings), width), attention_mask], 1)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden, between = self.entering(embeddings), list[torch.Tensor]()
        if session is not None:
            if output_hidden_states:
                raise InvalidSetting("output_hidden_states", "a session gives the last block's only: pass use_cache=False for all of them")
            hidden = session.step(hidden, attention_mask)
        elif output_hidden_states:
            for index, block in enumerate(self.blocks):
                between.append(hidden)
                hidden = block(hidden, prompts=None if deep is None else deep[index : index + 1], attention_mask=attention_mask)
        else:
            hidden = self.blocks(hidden, prompts=deep, attention_mask=attention_mask)
        hidden = self.leaving(hidden)[:, width:]
        states = (*(each[:, width:] for each in between), hidden) if output_hidden_states else None
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=states)


class DistributedForCausalLM(Distributed, GenerationMixin):
    """A language model whose blocks are computed by servers."""

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`, with all that it offers; the servers keep the caches.

        With a `session` of this model the answer goes on from what was put in and got out there before: give the new tokens
        only, and get them and the answer back.
        """
        if session is not None:
            return self._go_on(session, inputs, args, kwargs)
        if kwargs.get("use_cache") is False or kwargs.get("past_key_values") is not None:
            return self._stock_generate(inputs, *args, **kwargs)
        with self.inference_session() as own:
            return self._stock_generate(inputs, *args, past_key_values=RemoteCache(own), **kwargs)

    def _stock_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # annotated for a class of transformers' own

    def _go_on(self, session: InferenceSession, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = kwargs.pop("input_ids", None) if inputs is None else inputs
        before, whole = session.output_ids, new
        if before is not None:
            if new is not None and len(new) != len(before):
                raise InvalidSetting("inputs", f"{len(new)} sequences do not go on from the session's {len(before)}")
            whole = before if new is None else torch.cat([before, new.to(before)], 1)
            kwargs["attention_mask"] = _whole_mask(session, whole, new, kwargs.get("attention_mask"))
        began, count, answered = session.position, session.sequences, False
        try:
            result = self._stock_generate(whole, *args, past_key_values=RemoteCache(session), **kwargs)
            answered = True
        finally:
            if not answered:
                _undo(session, began, count)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        settings = kwargs.get("generation_config") or self.generation_config
        if (kwargs.get("num_beams") or settings.num_beams or 1) > 1:
            _leave_beams(session, len(sequences), 1 if whole is None else len(whole), 1 if whole is None else whole.shape[1])
        session.output_ids = sequences
        new = sequences if before is None else sequences[:, before.shape[1] :]
        if isinstance(result, torch.Tensor):
            return new
        result.sequences = new
        return result


def _whole_mask(session: InferenceSession, whole: torch.Tensor, new: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor:
    """Of all tokens [S, N]: padding of earlier turns stays padding. `given` is that of the new tokens, or ends with it."""
    mask = torch.ones(whole.shape, dtype=whole.dtype, device=whole.device)
    known = session.attention_mask[:, session.prefix :]
    mask[:, : known.shape[1]] = known.to(mask)
    if new is not None and given is not None and new.shape[1]:
        mask[:, -new.shape[1] :] = given[:, -new.shape[1] :].to(mask)
    return mask


def _leave_beams(session: InferenceSession, answers: int, inputs: int, columns: int) -> None:
    """Which beams won is not known here: go back to what all beams of an input have in common, one sequence for each answer."""
    beams, each = session.sequences // inputs, answers // inputs
    session.reorder([index * beams for index in range(inputs) for _ in range(each)])
    session.position = session.prefix + columns


def _undo(session: InferenceSession, position: int, sequences: int) -> None:
    """Go back to where the turn began."""
    if position and session.sequences > sequences:
        beams = session.sequences // sequences
        session.reorder([index * beams for index in range(sequences)])
    said = session.output_ids
    session.position = position
    session.output_ids = said


def _check_positions(positions: torch.Tensor | None, mask: torch.Tensor | None, cache: RemoteCache | None, columns: int) -> None:
    """Raises `InvalidSetting` for positions that do not count the columns that are no padding."""
    if positions is None:
        return
    past = 0 if cache is None else cache.get_seq_length()
    if mask is None:
        right = positions == torch.arange(past, past + columns, device=positions.device)
    else:
        kept = mask.to(positions.device)
        right = (positions == (kept.long().cumsum(1) - 1)[:, -columns:]) | (kept[:, -columns:] == 0)
    if not bool(right.all()):
        raise InvalidSetting("position_ids", "blocks count positions by the attention mask: leave position_ids out")


def _settings(given: dict[str, Any]) -> RemoteConfig:
    names = [field.name for field in fields(RemoteConfig)]
    for name, value in given.items():
        if name not in names:
            raise InvalidSetting(name, f"there is no such setting; there are {', '.join(names)}")
        if name in ("allowed_servers", "blocked_servers") and not isinstance(value, str) and isinstance(value, Iterable):
            given[name] = frozenset(value)
    return RemoteConfig(**{name: value for name, value in given.items() if value is not None})


def _dtype(given: torch.dtype | str | None, config: Any) -> torch.dtype:
    if given is None or given == "auto":
        given = getattr(config, "dtype", None) or torch.float32
    dtype = DTYPES.get(given) if isinstance(given, str) else given
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidSetting("torch_dtype", f"{given} is none of {', '.join(DTYPES)}")
    return dtype
