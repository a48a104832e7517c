"""transformers' models of every family, whose blocks are computed by servers: without a head, as a language model and as a classifier."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from corolla.errors import InvalidSetting, PromptError
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Checkpoint, Progress
from corolla.models.families import architecture
from corolla.models.linear import Linear, make_linear
from corolla.models.prompts import SoftPrompt, load_prompt, load_score, save_prompt
from corolla.models.quantized_files import stored_values
from corolla.models.span import DTYPES, check_head
from corolla.remote.cache import RemoteCache
from corolla.remote.calls import RemoteCalls
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
        prompt: str | Path | None = None,
        num_labels: int | None = None,
        device: str | None = None,
        progress: Progress | None = None,
        **servers: Any,
    ) -> Any:
        """The model `name`, an alias, a directory or a hub id: of its tensors only the embeddings, norms and the head are read.

        Args:
            initial_peers: multiaddrs of a swarm; without any the blocks are computed in this process.
            secret: of the swarm.
            torch_dtype, dtype: either name; what is computed here, and in this process, in. By default what the checkpoint says.
            tuning_mode: "ptune" puts `pre_seq_len` soft tokens in front, "deep_ptune" at every block too.
            prompt: a directory that a soft prompt was saved to, by `save_pretrained` or by PEFT, to begin with.
            num_labels: of a classifier; by default what the checkpoint says.
            device: that blocks in this process are computed on, "cpu", "cuda" or "cuda:1"; the CPU by default.
            servers: `RemoteConfig`'s settings: allowed_servers, blocked_servers, request_timeout, max_retries...

        Raises:
            ModelNotFound, CheckpointError, UnsupportedModel, InvalidSetting, PromptError, NetworkError: as their sentences say.
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
        if prompt is not None:
            model.load_prompt(prompt)
        elif tuning_mode is not None:
            model.bare.prompts = soft_prompts(tuning_mode, pre_seq_len, cast(torch.Tensor, model.get_input_embeddings().weight), blocks)
        opened = open_blocks(
            directory,
            blocks,
            computed_in,
            initial_peers=initial_peers,
            secret=None if secret is None else secret.encode(),
            device=device,
            config=settings,
        )
        model.connect(opened.calls)
        model._closing = weakref.finalize(model, opened.close)
        return model.eval()

    @property
    def bare(self) -> DistributedModel:
        """The model without its head."""
        bare: DistributedModel = self.base_model  # type: ignore[assignment]  # the family's prefix says which it is
        return bare

    def connect(self, calls: RemoteCalls) -> None:
        """Compute the blocks through `calls` from now on."""
        setattr(self.bare, self.bare._names.blocks, RemoteSequential(calls, Span(0, architecture(self.config).blocks)))

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

    @property
    def soft_prompt(self) -> SoftPrompt:
        """A copy of the soft prompt as it is now. Raises `PromptError` where there is none, or it is not finite."""
        if self.bare.prompts is None:
            raise PromptError("the model has no soft prompt: load it with tuning_mode='ptune', 'deep_ptune' or with prompt=DIRECTORY")
        return self.bare.prompts.as_they_are()

    def load_prompt(self, directory: str | Path) -> None:
        """Take the soft prompt of `directory`, of ours or PEFT's, in the place of the one there is; a classifier's head with it.

        Raises `PromptError` for files that are missing or damaged, and for a prompt of another model.
        """
        arch, weight = architecture(self.config), cast(torch.Tensor, self.get_input_embeddings().weight)
        self.bare.prompts = SoftPrompts.of(load_prompt(Path(directory), arch)).to(weight.device)
        score = load_score(Path(directory), arch)
        if score is not None and self.made_here:
            head = cast(torch.nn.Linear, self.score)
            if score.shape != head.weight.shape:
                raise PromptError(f"{directory}: its classifier has {len(score)} labels, and this one {len(head.weight)}: set num_labels")
            with torch.no_grad():
                head.weight.copy_(score)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:  # type: ignore[override]
        """Save what is trained, the soft prompt and a classifier's head, as PEFT does, deep prompts beside it; see `models.prompts`.

        Raises `PromptError` where there is none, or it is not finite; `StorageError`.
        """
        score = cast(torch.nn.Linear, self.score).weight if self.made_here else None
        save_prompt(Path(save_directory), self.soft_prompt, architecture(self.config), base_model=self.name_or_path or "", score=score)

    def _load(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Read what is on the meta device. A checkpoint's names may have the base model's prefix or not, whether ours do or not."""
        prefix = f"{self.base_model_prefix}."
        tensors = {}
        arch = architecture(self.config)
        if self.can_generate():
            for root in arch.names.prefixes:
                check_head(checkpoint, arch, f"{root}{arch.names.embedding}.weight")
        for name, parameter in self.named_parameters():
            spellings = [name, name.removeprefix(prefix), prefix + name]
            if name == "lm_head.weight":  # transformers' name for every family's
                spellings.append(f"{arch.names.head}.weight")
            stored = next((spelling for spelling in spellings if checkpoint.has(spelling)), name)
            if name in self.made_here and not checkpoint.has(stored):
                tensors[name] = torch.empty(parameter.shape, dtype=dtype).normal_(std=self.config.initializer_range)
            else:
                tensors[name] = stored_values(checkpoint, stored, tuple(parameter.shape), dtype)
        self.load_state_dict(tensors, strict=False, assign=True)  # what is tied to another tensor is not among them
        self.tie_weights()


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


_made: dict[tuple[type, type], Any] = {}


def distributed(ours: type, stock: type) -> Any:
    """transformers' class `stock` of a family with its blocks elsewhere, as `ours` has them: one class, however often it is asked for."""
    if (ours, stock) not in _made:
        about = {"__doc__": f"transformers' {stock.__name__} with its blocks elsewhere.", "__module__": "corolla.remote.models"}
        own: dict[str, Any] = {**about, "config_class": stock.config_class}  # type: ignore[attr-defined]
        _made[ours, stock] = type(f"Distributed{stock.__name__}", (ours, stock), own)
    return _made[ours, stock]


class DistributedModel(Distributed):
    """A base model, without a head, mixed into transformers' class of its family."""

    prompts: SoftPrompts | None

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            super().__init__(config)
        with torch.device("cpu"):  # its rotations are numbers
            self._names = names = architecture(config).names
        for name in [name for name, _ in self.named_children()]:
            if name not in (names.embedding, names.embedding_norm, names.final_norm):
                delattr(self, name)  # what blocks need, the servers have
        embedding: Any = self.get_input_embeddings()
        if hasattr(embedding, "embed_scale"):  # Gemma's, which is in no checkpoint
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device="cpu")
        self.prompts = None

    @property
    def blocks(self) -> RemoteSequential:
        """All of the model's blocks."""
        blocks: RemoteSequential = getattr(self, self._names.blocks)
        return blocks

    def entering(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What enters the first block, of what the embedding gives [S, N, E]."""
        norm = self._names.embedding_norm
        return embeddings if norm is None else getattr(self, norm)(embeddings)

    def leaving(self, hidden: torch.Tensor) -> torch.Tensor:
        """What enters the head, of what leaves the last block [S, N, E]: the final norm."""
        normed: torch.Tensor = getattr(self, self._names.final_norm)(hidden)
        return normed

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        soft_outputs: bool = False,
        **ignored: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As transformers', with `past_key_values` a `RemoteCache`. Positions count the columns that are no padding, as the
        attention mask [S, N] says: other `position_ids` are refused.

        Soft prompts stand in front of a new session, and of every input without one; the output leaves them out,
        unless `soft_outputs` asks for their rows too: the last of them predicts the first token.
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
        hidden = self.entering(embeddings)
        between: list[torch.Tensor] = []
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
        hidden = self.leaving(hidden)[:, 0 if soft_outputs else width :]
        states = (*(each[:, width:] for each in between), hidden) if output_hidden_states else None
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=states)


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


_FEW_ROWS = 64  # of hidden states; for more of them the stock product is as quick
_MOST_COPIED = 2**30  # bytes of a head; of a larger one no second copy is kept


class Head(nn.Linear):
    """A language model's head. Without gradients, on a CPU and for a few rows, its product is the one that servers compute: over a copy
    of the weight that is packed when it is first needed, of half the size or the same (SmolLM2 in float32, a row: 4 ms in place of 9)."""

    _packed: Linear | None = None
    _packed_of: tuple[int, int] | None = None  # the weight's address and version

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [..., vocabulary] of hidden states [..., hidden]."""
        rows = hidden.numel() // hidden.shape[-1]
        weight = self.weight
        if torch.is_grad_enabled() or weight.device.type != "cpu" or not 0 < rows <= _FEW_ROWS or weight.nbytes > _MOST_COPIED:
            return super().forward(hidden)
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self._packed is None or self._packed_of != state:
            self._packed, self._packed_of = make_linear(weight.detach(), self.bias, "packed"), state
        return self._packed(hidden.reshape(rows, -1).contiguous()).view(*hidden.shape[:-1], -1)


class _WithHead(Distributed):
    """Mixed into transformers' class of a family with some head."""

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            super().__init__(config)
            setattr(self, self.base_model_prefix, distributed(DistributedModel, type(self.base_model))(config))
        self.tie_weights()


class DistributedForSequenceClassification(_WithHead):
    """A classifier whose blocks are computed by servers, with a head, `score`, which is trained."""

    made_here = ("score.weight",)


class DistributedForCausalLM(_WithHead, GenerationMixin):
    """A language model whose blocks are computed by servers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stock = cast(nn.Linear, self.lm_head)
        self.lm_head = Head(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        self.tie_weights()

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
