"""The HTTP routes of OpenAI's API."""

import asyncio
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel

from eagleray.deploy.openai.chat import chat_chunks, chat_completion
from eagleray.deploy.openai.completions import completion, completion_chunks
from eagleray.deploy.openai.disconnect import while_connected
from eagleray.deploy.openai.error_handlers import install_handlers
from eagleray.deploy.openai.limits import MAX_TOKENIZED
from eagleray.deploy.openai.openapi import describe, failures, streamed
from eagleray.deploy.openai.prompts import SHORT, conversation_prompt, texts_tokens, token_strings, tokens_text
from eagleray.deploy.openai.request_body import body_route
from eagleray.deploy.openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    TokenizeText,
)
from eagleray.deploy.openai.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Load,
    ModelCard,
    ModelList,
    ModelPermission,
    Text,
    TokenizerInfo,
    Tokens,
    Version,
)
from eagleray.deploy.openai.served_model import ServedModel
from eagleray.deploy.openai.sse import EventStream


def make_app(served: ServedModel) -> FastAPI:
    """OpenAI's API for one model; `/docs` describes it."""
    app = FastAPI(title="Eagleray", version=version("eagleray"), description="OpenAI's API over Eagleray.")
    install_handlers(app)
    app.include_router(generation_routes(served))
    app.include_router(token_routes(served))
    app.include_router(model_routes(served))
    describe(app, ChatCompletionChunk)
    return app


def generation_routes(served: ServedModel) -> APIRouter:
    """The two ways to generate."""
    router = APIRouter(tags=["generate"], route_class=body_route(served, generates=True))

    @router.post("/v1/completions", response_model=Completion, responses=streamed(Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        if body.stream:
            return EventStream(completion_chunks(served, body))
        return _json(await while_connected(request.receive, completion(served, body)))

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=streamed(ChatCompletionChunk))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        if body.stream:
            return EventStream(chat_chunks(served, body))
        return _json(await while_connected(request.receive, chat_completion(served, body)))

    return router


def token_routes(served: ServedModel) -> APIRouter:
    """vLLM's extensions around the tokenizer."""
    router = APIRouter(tags=["tokens"], route_class=body_route(served, generates=False))

    @router.post("/tokenize", response_model=Tokens, responses=failures())
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation in the model's chat template."""
        served.check_model(body.model)
        if isinstance(body, TokenizeText):
            (ids,) = await texts_tokens(served, [body.prompt], body.add_special_tokens, MAX_TOKENIZED)
        else:
            ids = (await conversation_prompt(served, body, MAX_TOKENIZED))["prompt_token_ids"]

        def whole() -> Response:
            strings = {"token_strs": token_strings(served, ids)} if body.return_token_strs else {}
            return _json(Tokens(count=len(ids), max_model_len=served.max_model_len, tokens=ids, **strings))

        return whole() if len(ids) <= SHORT else await asyncio.to_thread(whole)

    @router.post("/detokenize", responses=failures())
    async def detokenize(body: DetokenizeRequest) -> Text:
        """The text of token ids, special tokens included."""
        served.check_model(body.model)
        return Text(prompt=await tokens_text(served, body.tokens))

    @router.get("/tokenizer_info", responses=failures(of_model=False))
    async def tokenizer_info() -> TokenizerInfo:
        """What the model's tokenizer_config.json says, and the chat template, wherever that stands."""
        tokenizer = served.tokenizer
        known = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokenizer.config
        return TokenizerInfo.model_validate(known | {"chat_template": tokenizer.chat_template})

    return router


def model_routes(served: ServedModel) -> APIRouter:
    """What is served."""
    router = APIRouter(tags=["models"])
    card = ModelCard(
        id=served.model_name,
        object="model",
        created=served.created,
        owned_by="eagleray",
        root=served.root or served.model_name,
        parent=None,
        max_model_len=served.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{served.model_name}", created=served.created)],
    )

    @router.get("/v1/models", responses=failures(of_model=False))
    async def models() -> ModelList:
        """The one model."""
        return ModelList(object="list", data=[card])

    @router.get("/v1/models/{model:path}", responses=failures())
    async def model(model: str) -> ModelCard:
        """A model by its name."""
        served.check_model(model)
        return card

    @router.get("/load", responses=failures(of_model=False))
    async def load() -> Load:
        """How much there is to do."""
        return Load(server_load=served.engine.num_requests)

    @router.get("/version", responses=failures(of_model=False))
    async def get_version() -> Version:
        """Eagleray's version."""
        return Version(version=version("eagleray"))

    return router


def _json(reply: BaseModel | bytes) -> Response:
    body = reply if isinstance(reply, bytes) else reply.model_dump_json(exclude_unset=True)
    return Response(body, media_type="application/json")
