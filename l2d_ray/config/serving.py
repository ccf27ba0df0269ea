"""Settings of the HTTP endpoint."""

from typing import Literal, Self

from pydantic import Field, model_validator

from l2d_ray.config.section import File, Section


class ServeConfig(Section):
    """The HTTP endpoint, jobs/serve.py and cluster/serve.yaml."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0, with keys only, for other machines. jobs/serve.py reads it; `serve deploy` reads
    http_options of the YAML file. Ray protects its own ports (token, TLS)."""
    port: int = Field(8000, ge=1, le=65_535)
    """Port to listen on."""
    layout: Literal["auto", "colocated", "distributed"] = "auto"
    """colocated: HTTP, model and index in one process, serve.encoders times. A request costs milliseconds less.
    distributed: each in separate processes, which grow and fail apart. auto: colocated if the index fits in
    serve.shard_megabytes, serve.gateways, serve.encoders and serve.shard_replicas are 1, and workers.gpus is 0."""
    gateways: int = Field(1, ge=1)
    """Replicas of the gateway, which speaks HTTP. With two, one may die without a user noticing. With one, up to
    serve.max_waiting requests wait for its successor on the head node."""
    encoders: int = Field(1, ge=1)
    """Replicas of the model, each with workers.cpus and workers.gpus. With two, one may die or hang without a user
    noticing: the other one answers after 0.4 serve.deadline_seconds, until the first is replaced, within 90 s."""
    cache_megabytes: float = Field(1024, ge=0)
    """Cache of each encoder for keys and values of recent histories, in MB. Of a returning user only the new items run.
    A history takes tokens x layers x 2 x key size (SmolLM2-135M: 46 KB a token, Llama-3.2-1B: 33 KB). A promotion,
    which holds two models, needs it twice."""
    shard_replicas: int = Field(1, ge=1)
    """Replicas of each shard of the index. With two, one may die without a user noticing."""
    shard_megabytes: float = Field(256, gt=0)
    """Approximate size of a shard process, in MB; small shards of the index share one. Both another process and more
    megabytes to search cost milliseconds. Up to this size, serve.layout=auto keeps the index next to the model."""
    partial: bool = False
    """If a shard is away, answer from the others and mark the answer as partial, instead of 503. In the
    colocated layout no shard can be away."""
    deadline_seconds: float = Field(10, gt=0)
    """Seconds until a request is answered with 504."""
    shard_seconds: float = Field(3, gt=0)
    """Seconds without an answer after which a shard counts as away. With several serve.shard_replicas, a second one is
    asked after a third of it, unless many requests are in flight."""
    max_waiting: int = Field(200, ge=1)
    """Requests that may wait in an encoder, in a gateway for an encoder, and for a gateway. Beyond that, or if they
    could not be done within the deadline, requests are answered with 503 and Retry-After."""
    max_k: int = Field(100, ge=20, le=10_000)
    """Maximum k of a request; the default of a request is 20."""
    max_history: int = Field(1000, ge=1)
    """Maximum number of items in a history."""
    max_title_chars: int = Field(500, ge=1)
    """Maximum length of a title in a history, and of a title search, in characters."""
    max_filter_items: int = Field(10_000, ge=1)
    """Maximum number of item ids in `deny` or `allow`."""
    max_batch: int = Field(64, ge=1)
    """Maximum number of requests in one batch request."""
    max_body_bytes: int = Field(1 << 20, ge=1)
    """Maximum size of a request's body, in bytes."""
    keys_file: File | None = None
    """File with the keys that clients may use as bearer tokens, one a line. Changes apply at once. The environment
    variable L2D_RAY_KEYS may hold more, separated by commas. Without keys, everybody who reaches the port may ask."""
    beams: int | None = Field(None, ge=2)
    """Also offer constrained beam search with this many beams, at /v1/beam_search and on the page, for comparison. It
    loads a model for itself and takes seconds a request. null: no."""
    beam_seconds: float = Field(120, gt=0)
    """Seconds until a beam search is answered with 504."""
    recommender: list[str] = Field([])
    """Recommenders to serve next to L2D, by their names in evaluate.recommenders, such as sasrec,transitions. A request
    names the one that answers; L2D is the default. Those that write text take seconds and are refused. Replicas:
    serve.encoders, with workers.cpus and workers.gpus each if a recommender runs the model."""
    follow: bool = False
    """Serve each newer index of the workspace once it is built, as jobs/promote.py does. An index of another model, or
    of a dataset that does not continue the served one, is left out, with a line in the log. jobs/promote.py can return
    to an older index, which then stays until the next one is built."""
    log_histories: bool = False
    """Log each answered request and its response, to Ray Serve's JSON files and to stderr of the gateways."""
    cors_origins: list[str] = Field([])
    """Web origins whose scripts may call the endpoint, in addition to its own page. They cannot read answers that are
    not the application's, such as a 503 while the gateways are away."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        most = max(self.gateways, self.shard_replicas)
        if self.layout == "colocated" and most > self.encoders:
            raise ValueError(
                f"serve.layout=colocated: replicates everything serve.encoders={self.encoders} times, which is below"
                f" serve.gateways={self.gateways} or serve.shard_replicas={self.shard_replicas}; set"
                f" serve.encoders={most}, or serve.layout=distributed"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_fits(self) -> Self:
        if self.max_waiting < self.max_batch:
            raise ValueError(
                f"serve.max_waiting={self.max_waiting} is below serve.max_batch={self.max_batch}, so that a full batch"
                " would always be refused; raise it or lower serve.max_batch"
            )
        return self
