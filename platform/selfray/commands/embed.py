"""`selfray embed`: writes every image's embedding to Parquet files."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional

from selfray.check import require
from selfray.commands.flags import DeviceGpusFlag, ImageColumnFlag, TrackingFlag, flag
from selfray.commands.labelled import devices_of
from selfray.commands.subjects import open_subjects
from selfray.storage import Location, one_line

if TYPE_CHECKING:
    from selfray.console import Console
    from selfray.data.shard_set import ShardSet


BLOCK, BLOCK_WITH_PATCHES = 1024, 128
"""Images per output file, without and with patch tokens."""


@dataclass(frozen=True)
class Embed:
    """Write the embedding of every image to Parquet files with the columns path, label and
    embedding, for pandas, polars, duckdb or faiss. After an interruption, the same command resumes.
    The files do not depend on the number of tasks.
    $ selfray embed runs/dino-imagenet-1a2b3c4d --data images/ --to embeddings/
    """

    interrupted: ClassVar[str] = "finished files are kept; the same command resumes"

    encoder: Annotated[
        Positional[str],
        flag(
            """Run folder or checkpoint, local, s3:// or gs://; mlruns:/RUN_ID; a file or folder
            that `selfray export` wrote; or timm:NAME with its published weights.""",
            "ENCODER",
        ),
    ]
    data: Annotated[
        str,
        flag("Images: a folder of them, shards or Parquet files; local, s3:// or gs://.", "PATH"),
    ]
    to: Annotated[str, flag("Folder to write; local, s3:// or gs://.", "FOLDER")]
    dtype: Annotated[Literal["float32", "float16"], flag("Data type of the embeddings.")] = (
        "float32"
    )
    patches: Annotated[
        bool, flag("Also write the patch tokens (float16); much larger files.", default="")
    ] = False
    normalize: Annotated[bool, flag("Scale each embedding to L2 norm 1.", default="")] = False
    image_size: Annotated[
        int | None, flag("Side in pixels that images are resized to.", "PIXELS", "the encoder's")
    ] = None
    image_column: ImageColumnFlag = None
    device_gpus: DeviceGpusFlag = None
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        require(
            self.image_size is None or self.image_size > 0,
            f"--image-size must be positive, got {self.image_size}",
        )
        console.live("loading torch and ray")
        from selfray.cluster import runtime
        from selfray.cluster.embedding_tasks import write_embeddings
        from selfray.cluster.endings import RunFailed, root_cause
        from selfray.data.data_sets import needs_build
        from selfray.pace import Pace
        from selfray.probes.embedding import Contents, Embedding, Rows

        (named,) = open_subjects([self.encoder], self.image_size, self.tracking, console)
        subject = named.subject
        contents = Contents(
            path=True, patches=self.patches, normalize=self.normalize, dtype=self.dtype
        )
        with ExitStack() as stack:
            if needs_build(self.data):
                console.live("starting Ray")
                stack.enter_context(runtime.session())
            # Raw pixels have no encoder.
            channels = 3 if subject.encoder is None else subject.encoder.encoder_config.in_channels
            shards = self._shards(named.output, channels, console)
            stack.enter_context(runtime.session())
            block = BLOCK_WITH_PATCHES if self.patches else BLOCK
            job = Embedding(Rows.all_of(shards), subject.encoder, subject.size, contents, block)
            pace = Pace(console, "embedding", len(job.rows))
            folder = Location.of(self.to)
            try:
                devices = devices_of(self.device_gpus)
                written = write_embeddings(job, folder, devices, pace.advance)
            except Exception as error:
                cause = root_cause(error)
                if isinstance(cause, OSError) and cause is not error:  # of a task
                    raise RunFailed(
                        f"the embeddings of {folder} stopped: {one_line(cause)}; finished files "
                        "are kept, the same command goes on"
                    ) from error
                raise cause from error
        before = job.blocks - written.blocks_now
        console.say(
            f"{folder}: {written.images:,} embeddings in {job.blocks:,} files"
            + (f", {before:,} of them written earlier" if before else "")
        )
        if written.unreadable:
            console.say(f"{written.unreadable:,} images could not be read and are left out")
        return 0

    def _shards(self, output: Location, channels: int, console: "Console") -> "ShardSet":
        """All images of --data, including those of its test split."""
        from selfray.cluster.build import build_told
        from selfray.data.data_sets import open_data
        from selfray.experiment import DataConfig

        config = DataConfig(self.data, image_column=self.image_column, channels=channels)
        opened = open_data(config, output, console.say, build_told)
        train, test = opened.train, opened.test
        if test is None:
            return train
        return replace(train, files=(*train.files, *test.files))
