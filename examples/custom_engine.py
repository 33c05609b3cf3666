"""An engine of your own in under 100 lines: one sequence at a time, no KV cache. `engine: {name: custom_engine:Plain}`

Does it keep an engine's promises? `cd examples; python -m skillsd.engines.conformance custom_engine:Plain nano`"""

import copy
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skillsd.engines.base import Engine, Learner, Sample, Sampler, StepReport, WeightsHandle, check_request
from skillsd.engines.options import Capabilities, EngineOptions
from skillsd.engines.torch.models import resolve, stop_tokens
from skillsd.engines.torch.sampling import choose
from skillsd.metrics import add_metrics
from skillsd.objective import CHOSEN, TokenLogprobs


class PlainEngine(Learner, Sampler):
    def __init__(self, spec):
        self.student = AutoModelForCausalLM.from_pretrained(resolve(spec.model), dtype=torch.float32).eval()
        self.teacher, self.tokenizer = copy.deepcopy(self.student), AutoTokenizer.from_pretrained(resolve(spec.model))
        self.stop_tokens = stop_tokens(self.student, self.tokenizer)
        self.adam = torch.optim.AdamW(self.student.parameters(), betas=spec.betas, weight_decay=spec.weight_decay)
        self.max_length, self.max_norm = self.student.config.max_position_embeddings, spec.max_grad_norm
        self.version, self.finite, self.sessions, self.parts = 0, True, {}, (self.student, self.teacher, self.adam)

    def read(self, model, sequence, temperature):  # log-probs of the marked tokens, with gradient
        if len(sequence.tokens) > self.max_length:
            raise ValueError(f"{len(sequence.tokens)} tokens for a model that takes {self.max_length}")
        ids, mask = torch.tensor(sequence.tokens), torch.tensor(sequence.mask)
        logits = model(ids[None]).logits[0, :-1][mask[1:]].float() / temperature
        return TokenLogprobs(logits.log_softmax(-1).gather(1, ids[mask][:, None])[:, 0])

    @torch.no_grad()
    async def logprobs(self, sequences, weights="student", *, temperature=1.0, want=CHOSEN):
        return [self.read(getattr(self, weights), sequence, temperature) for sequence in sequences]

    async def forward_backward(self, batch, loss, *, temperature=1.0):
        parts = [loss(self.read(self.student, item.sequence, temperature), item.signals) for item in batch]
        total = sum(value for value, _ in parts)
        self.finite &= bool(total.isfinite())
        total.backward()
        return add_metrics(metrics for _, metrics in parts)

    async def step(self, learning_rate):
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.max_norm)
        applied, self.finite = self.finite and bool(norm.isfinite()), True
        if applied:
            self.adam.param_groups[0]["lr"] = learning_rate
            self.adam.step()
            self.version += 1
        self.adam.zero_grad()
        return StepReport(applied, norm.item(), self.version)

    async def sync_teacher(self, rate=1.0):  # a snapshot, never an average: see the capabilities
        self.teacher.load_state_dict(self.student.state_dict())

    @torch.no_grad()
    async def sample(self, request):
        check_request(request, self.max_length, self.sessions.get(request.session, ()))
        tokens, logprobs, rng, temperature = list(request.tokens), [], random.Random(request.seed), request.temperature
        while len(logprobs) < request.max_tokens and not (logprobs and tokens[-1] in self.stop_tokens):
            token, logprob = choose(self.student(torch.tensor([tokens])).logits[:, -1], [temperature], [rng.random()])
            tokens, logprobs = tokens + token, logprobs + logprob
        self.sessions |= {request.session: tuple(tokens)} if request.session else {}
        reason = "stop" if tokens[-1] in self.stop_tokens else "length"
        return Sample(tuple(tokens[len(request.tokens) :]), tuple(logprobs), reason, self.version)

    def end_session(self, session):
        self.sessions.pop(session, None)

    async def publish(self, folder=None):
        return WeightsHandle(self.version)

    async def load(self, weights):
        self.sessions.clear()  # it samples from the very weights that it trains

    async def export(self, folder, *, merge=False):
        self.student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    async def save_state(self, folder):
        await self.export(folder / "model")
        torch.save([self.version, *(part.state_dict() for part in self.parts)], folder / "state.pt")

    async def load_state(self, folder):
        self.version, *states = torch.load(folder / "state.pt", weights_only=True)
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self.adam.zero_grad()


class Plain(EngineOptions):  # keys of its own would be fields here
    capabilities = Capabilities(temperature=True, teacher_snapshot=True, refuses_non_finite=True, exact_resume=True)

    def build(self, spec):
        engine = PlainEngine(spec)
        return Engine(engine, engine, self.name, self.capabilities)
