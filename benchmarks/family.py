"""Figures of docs/results.md: the methods side by side, at equal time of training.

    python benchmarks/family.py DATA OUT [--minutes 60] [--only NAME,…] [--tests TEST,…]
                                          [--json FILE] [--guide FILE]

DATA holds `tiny-imagenet-50`, `camvid` and `bccd`; OUT gets all runs and scores. The same command
goes on where it was stopped, and `--only` runs a part of it: a method, `untrained`, `pixels` or
`adapt`. `--tests` leaves the other scores for later. OUT/family.md has the tables so far,
OUT/family.png the scores by compute.

Each method trains an encoder of one shape on tiny-imagenet-50 at 64 pixels by its tiny recipe, for
as many updates as it makes in some minutes at its own speed. All speeds are measured one after the
other, before any long run; those measured later are put right by MAE's, measured again beside them.
What a method needs is trained in a part of its own time: a tokenizer in a quarter, a teacher in a
half. Encoders are scored frozen and fine-tuned; a running probe, whose time is not counted, gives
kNN over time. `mae-15`, `mae-50` and `mae-90` are MAE at other masking ratios.

`adapt` trains MAE on half of the classes, in a third of the minutes with each of three seeds, and
continues on the unlabelled pictures of CamVid and of BCCD for a sixth each: by MAE, and by `mimray
adapt` where there is that command. Differences from the start are paired by seed.

With 60 minutes it takes about 18 hours on two CPU cores: the training, and some ten minutes of
scoring for each method, half of them fine-tuning (estimated from MAE at 10 minutes).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from family_tables import chart, guide, tables
from measuring import (
    DECODER,
    SHAPE,
    TESTS,
    CommandFailedError,
    Speed,
    Test,
    mimray,
    rows,
    scored,
    settings,
    speed_of,
    steps_in,
)

ROUNDS = 2
PROBES = 8
SEEDS = (0, 1, 2)
PICTURES = "tiny-imagenet-50"
TARGETS = {"camvid": "train", "bccd": "JPEGImages"}
ADAPTED_TESTS = {"camvid": ("camvid-knn", "camvid-linear"), "bccd": ("bccd",)}
UNTRAINED, PIXELS, ADAPT = "untrained", "pixels", "adapt"
REFERENCE = "mae"


class Member(NamedTuple):
    """A method of the family.

    Attributes:
        name: its name in tables, and that of its run.
        recipe: a shipped recipe.
        sets: changes of the recipe beside the encoder's shape.
        needs: the member, or the tokenizer, that is trained beforehand; empty for none.
        key: the recipe's key that names it.
        share: the part of the minutes that it takes.
        own_encoder: True if the encoder is not of the common shape.
    """

    name: str
    recipe: str
    sets: tuple[str, ...] = ()
    needs: str = ""
    key: str = ""
    share: float = 0.0
    own_encoder: bool = False

    def arguments(self, data: Path, needed: Path | None) -> list[str]:
        """The arguments of its training, without name, storage and length.

        Args:
            data: the pictures.
            needed: the run that it needs.
        """
        shape = () if self.own_encoder else SHAPE
        key = (f"{self.key}={needed}",) if self.key else ()
        return [
            "pretrain", self.recipe, "--data", str(data), *settings(*shape, *self.sets, *key),
        ]  # fmt: skip


_VIT = ("encoder.name=vit", "encoder.patch_size=8")
_VISIBLE = ("method.masking=random", "method.mask_ratio=0.75", "method.decoder_num_heads=4")
TOKENIZER = Member("dvae", "dvae-tiny", own_encoder=True)
MEMBERS = {
    member.name: member
    for member in (
        Member("ae", "ae-vit-tiny"),
        Member(
            "vae", "vae-tiny", (*_VIT, "method.decoder_widths=[96,48,16]", "optim.base_lr=4e-3")
        ),
        Member("beit", "beit-tiny", needs="dvae", key="method.tokenizer", share=0.25),
        Member("mae", "mae-tiny", DECODER),
        Member("mae-cross", "mae-cross-tiny", (*DECODER, "method.encoder_layers=[0,1,2,3,4,5]")),
        Member("simmim", "simmim-tiny"),
        Member("maskfeat", "maskfeat-tiny"),
        Member("maskfeat-mae", "maskfeat-tiny", (*_VISIBLE, *DECODER)),
        Member("distill", "distill-tiny", needs="mae", key="method.teacher", share=0.5),
        Member("ibot", "ibot-tiny"),
        Member("capi", "capi-tiny"),
        Member("mae-15", "mae-tiny", (*DECODER, "method.mask_ratio=0.15")),
        Member("mae-50", "mae-tiny", (*DECODER, "method.mask_ratio=0.5")),
        Member("mae-90", "mae-tiny", (*DECODER, "method.mask_ratio=0.9")),
    )
}


class Family:
    """The benchmark as far as it has come; every figure is written at once.

    Args:
        data: the folder of the data sets.
        out: the directory of runs and figures.
        asked: what must be alike in every start: minutes, epochs, limit.
        tests: the names of the scores to compute in this start.
    """

    def __init__(
        self, data: Path, out: Path, asked: dict[str, Any], tests: Sequence[str] = tuple(TESTS)
    ) -> None:
        self.data, self.out, self.asked, self.tests = data, out, asked, tests
        self._file = out / "family.json"
        self.found: dict[str, Any] = {"asked": asked, "speeds": {}, "runs": {}, "scores": {}}
        self.found["adapted"] = []
        if self._file.is_file():
            self.found = json.loads(self._file.read_text())
            if self.found["asked"] != asked:
                raise SystemExit(
                    f"{out} was begun with {self.found['asked']}, not {asked}: repeat those, or "
                    "take another OUT"
                )

    def keep(self) -> None:
        """Write the figures so far, and their tables."""
        self.out.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(part, self._file)
        tables(self.found, self.out)

    def measure_speeds(self, members: Sequence[Member]) -> dict[str, str]:
        """Measure the speeds that are missing, one after the other, forwards and then backwards.

        Returns:
            The error of each member that could not be trained.
        """
        known = self.found["speeds"]
        missing = [member for member in members if member.name not in known]
        needed = [TOKENIZER for member in missing if member.needs == "dvae"]
        missing = [*(one for one in needed if one.name not in known), *missing]
        if not missing:
            return {}
        # MAE always: it tells how fast the machine is by now, and the others have its encoder.
        missing = list({m.name: m for m in (MEMBERS[REFERENCE], *missing)}.values())
        measured: dict[str, list[Speed]] = {member.name: [] for member in missing}
        failed: dict[str, str] = {}
        for number in range(ROUNDS):
            for member in missing[:: -1 if number % 2 else 1]:
                needs = self.out / "speed" / member.needs if member.needs else None
                training = member.arguments(self.data / PICTURES, needs)
                run = self.out / "speed" / (member.name + "-again" * bool(number))
                try:
                    measured[member.name].append(speed_of(training, run, anew=True))
                except CommandFailedError as error:
                    failed[member.name] = str(error)
                    print(f"{member.name}: {error}", flush=True)
        if REFERENCE in failed:
            raise SystemExit(f"{REFERENCE}, which others are held against: {failed[REFERENCE]}")
        speeds = {
            name: {
                "images_per_s": sum(one.images_per_s for one in found) / len(found),
                "batch": found[0].batch,
                "measured": [one.images_per_s for one in found],
            }
            for name, found in measured.items()
            if name not in failed
        }
        drift = 1.0
        if REFERENCE in known:
            drift = known[REFERENCE]["images_per_s"] / speeds[REFERENCE]["images_per_s"]
        for name, speed in speeds.items():
            known.setdefault(name, {**speed, "images_per_s": speed["images_per_s"] * drift})
        self.keep()
        return failed

    def train(self, member: Member) -> None:
        """Train a member, and before it what it needs, as long as its minutes allow."""
        if member.name in self.found["runs"]:
            return
        minutes, needed, before = self.asked["minutes"], None, 0.0
        if member.needs:
            other = TOKENIZER if member.needs == "dvae" else MEMBERS[member.needs]
            needed = self.out / f"{member.name}-{other.name}"
            before = self._run(other, needed, minutes * member.share, None)["pflop"]
        run = self.out / member.name
        own = self._run(member, run, minutes * (1 - member.share), needed)
        self.found["runs"][member.name] = {
            **own, "pflop": own["pflop"] + before, "minutes_before": minutes * member.share,
        }  # fmt: skip
        self.keep()

    def _run(
        self, member: Member, run: Path, minutes: float, needed: Path | None
    ) -> dict[str, Any]:
        """Train or go on; the length, the compute and the kNN on the way."""
        speed = self._speed(member.name)
        steps = steps_in(minutes, speed)
        every = max(1, steps // PROBES)
        training = member.arguments(self.data / PICTURES, needed)
        probe: dict[str, Any] = {
            "every_steps": every,
            "task": "knn",
            "data": str(self.data / PICTURES),
        }
        probe["limit"] = self._probe_limit
        mimray(
            *training, "--storage", str(run.parent), "--name", run.name, "--steps", str(steps),
            *settings(f"evaluation={json.dumps(probe)}"),
        )  # fmt: skip
        cost = mimray("plan", *training[1:])
        a_picture = cost["training_flops"]["plain"]
        curve = [
            [row["samples"] / speed.images_per_s / 60, row["samples"], row["probe_knn_accuracy"]]
            for row in rows(run)
            if "probe_knn_accuracy" in row
        ]
        return {
            "steps": steps,
            "pictures": steps * speed.batch,
            "minutes": minutes,
            "images_per_s": speed.images_per_s,
            "pflop": a_picture * steps * speed.batch / 1e15,
            "gflop_a_picture": a_picture / 1e9,
            "recipe": member.recipe,
            "mask_ratio": json.loads((run / "plan.json").read_text())["recipe"]["method"].get(
                "mask_ratio"
            ),
            "curve": curve,
        }

    def _speed(self, name: str) -> Speed:
        found = self.found["speeds"][name]
        return Speed(found["images_per_s"], found["batch"])

    def score(self, name: str, bundle: str) -> None:
        """Score an encoder by every test that it has no score of yet."""
        scores = self.found["scores"].setdefault(name, {})
        for test_name in self.tests:
            if test_name in scores:
                continue
            test = TESTS[test_name]
            results = self.out / "scores" / f"{name}-{test_name}"
            options: tuple[str, ...] = ()
            if test.task == "finetune":
                options = (f"storage={self.out / 'finetuned'}", f"name={name}")
            scores[test_name] = scored(
                test, self.data, bundle, results, options,
                epochs=self.asked["epochs"], limit=self.asked["limit"],
            )  # fmt: skip
            self.keep()

    def score_untrained(self, bundle: str) -> None:
        """Score an untrained encoder, and by kNN as running probes do, on fewer pictures."""
        self.score(UNTRAINED, bundle)
        if "untrained_probe" not in self.found:
            results = self.out / "scores/untrained-probe"
            self.found["untrained_probe"] = scored(
                TESTS["knn"], self.data, bundle, results, limit=self._probe_limit
            )
            self.keep()

    @property
    def _probe_limit(self) -> int:
        """Pictures that running probes learn from, and that they score on."""
        return int(self.asked["limit"] or 2000)

    def score_pixels(self) -> None:
        """Score raw pixels by the tests that train no encoder."""
        from pixels import pixels_scored

        scores = self.found["scores"].setdefault(PIXELS, {})
        for name in self.tests:
            test = TESTS[name]
            if name not in scores and test.task != "finetune":
                length = test.epochs and (self.asked["epochs"] or test.epochs)
                result = pixels_scored(
                    test.task, self.data / test.data, test.options,
                    epochs=length, limit=self.asked["limit"],
                )  # fmt: skip
                scores[name] = test.value(result)
                self.keep()

    def adapt(self) -> None:
        """Pre-train on half of the classes, continue on other pictures, and compare by seed."""
        half = half_of_the_classes(self.data / PICTURES, self.out / "half")
        minutes = self.asked["minutes"]
        member = MEMBERS[REFERENCE]
        steps = steps_in(minutes / 3, self._speed(REFERENCE))
        starts = {seed: self.out / f"start-{seed}" for seed in SEEDS}
        for seed, start in starts.items():
            self._trained(member.arguments(half, None), start, seed, steps)
        ways = list(self._ways(starts))
        lengths = {
            run.name: self._adapting_steps(run, training, minutes / 6)
            for _, _, seed, run, training in ways
            if seed == SEEDS[0]
        }
        for way, target, seed, run, training in ways:
            key = [way, target, seed]
            if any([one["way"], one["on"], one["seed"]] == key for one in self.found["adapted"]):
                continue
            steps = lengths[run.name.rpartition("-")[0] + f"-{SEEDS[0]}"]
            self._trained(training, run, seed, steps)
            differences = {
                test_name: [
                    self._once(TESTS[test_name], encoder)["headline"]
                    for encoder in (run, starts[seed])
                ]
                for test_name in (*ADAPTED_TESTS[target], "knn")
            }
            verdict = self._verdict(run, starts[seed], target)
            self.found["adapted"].append(
                {"way": way, "on": target, "seed": seed, "steps": steps, "scores": differences}
                | ({"verdict": verdict} if verdict else {})
            )
            self.keep()

    def _ways(self, starts: dict[int, Path]) -> Iterator[tuple[str, str, int, Path, list[str]]]:
        """Way, target, seed, run and command of each adaptation."""
        for target, folder in TARGETS.items():
            pictures = str(self.data / target / folder)
            for seed, start in starts.items():
                mae = ["pretrain", "mae-tiny", "--data", pictures, "--init", str(start)]
                mae += settings(*SHAPE, *DECODER)
                yield "mae --init", target, seed, self.out / f"{target}-mae-{seed}", mae
                if has_command("adapt"):
                    command = ["adapt", str(start), "--data", pictures, "--recipe", "adapt-tiny"]
                    yield "adapt", target, seed, self.out / f"{target}-adapt-{seed}", command

    def _adapting_steps(self, run: Path, training: list[str], minutes: float) -> int:
        """The length of one way on one set of pictures, by its speed there, measured once."""
        known = self.found["speeds"]
        if run.name not in known:
            speed = speed_of(training, self.out / "speed" / run.name, anew=True)
            known[run.name] = speed._asdict()
            self.keep()
        return steps_in(minutes, self._speed(run.name))

    def _trained(self, training: list[str], run: Path, seed: int, steps: int) -> None:
        mimray(
            *training, "--storage", str(run.parent), "--name", run.name, "--steps", str(steps),
            *settings(f"seed={seed}"),
        )  # fmt: skip

    def _once(self, test: Test, run: Path) -> dict[str, Any]:
        """A score, computed once for each encoder."""
        scores = self.found["scores"].setdefault("of adaptation", {}).setdefault(run.name, {})
        if test.title not in scores:
            results = self.out / "scores" / f"{run.name}-{test.task}"
            scores[test.title] = scored(
                test, self.data, str(run), results,
                epochs=self.asked["epochs"], limit=self.asked["limit"],
            )  # fmt: skip
            self.keep()
        found: dict[str, Any] = scores[test.title]
        return found

    def _verdict(self, run: Path, start: Path, target: str) -> dict[str, Any] | None:
        """The words of `mimray verdict`, without labels; None where there is no such command."""
        if not has_command("verdict"):
            return None
        limit = self.asked["limit"]
        found = mimray(
            "verdict", str(run), str(start), "--data", str(self.data / target / TARGETS[target]),
            "--out", str(self.out / "verdicts" / run.name),
            "--retain", str(self.data / PICTURES), *(["--limit", str(limit)] if limit else []),
        )  # fmt: skip
        return {key: found[key] for key in ("gain", "lines")}


def has_command(name: str) -> bool:
    """True if this version of mimray has a command."""
    from mimray.service.cli.main import COMMANDS

    return any(command.name == name for command in COMMANDS)


def half_of_the_classes(data: Path, out: Path) -> Path:
    """The pictures of the first half of the classes, as a data set of its own."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(data.glob("*.parquet")):
        if not (out / file.name).is_file():
            table = pq.read_table(file)
            middle = (pc.max(table["label"]).as_py() + 1) // 2
            part = out / f"{file.name}.part"
            pq.write_table(table.filter(pc.less(table["label"], middle)), part, row_group_size=500)
            os.replace(part, out / file.name)
    return out


def available() -> dict[str, Member]:
    """The members whose recipe this version of mimray ships."""
    from mimray.trainers.config.recipes import shipped_recipes

    return {name: one for name, one in MEMBERS.items() if one.recipe in shipped_recipes()}


def run(family: Family, chosen: Sequence[str]) -> list[str]:
    """Run the parts chosen; returns the errors of those that failed."""
    members = [MEMBERS[name] for name in chosen if name in MEMBERS]
    without_speed = family.measure_speeds(members or [MEMBERS[REFERENCE]])
    failed = [f"{name}: {error}" for name, error in without_speed.items()]
    for name in chosen:
        if name in without_speed:
            continue
        try:
            if name == UNTRAINED:
                family.score_untrained(f"untrained:{family.out / 'speed' / REFERENCE}")
            elif name == PIXELS:
                family.score_pixels()
            elif name == ADAPT:
                family.adapt()
            else:
                family.train(MEMBERS[name])
                chart(family.found, family.out)
                family.score(name, str(family.out / name))
        except CommandFailedError as error:
            failed.append(f"{name}: {error}")
            print(failed[-1], flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="of training, each method")
    parser.add_argument("--only", default="", help="names of parts, with commas between them")
    parser.add_argument("--tests", default="", help="names of scores, with commas between them")
    parser.add_argument("--epochs", type=int, help="of every head, for a trial of the benchmark")
    parser.add_argument("--limit", type=int, help="pictures to score by, for a trial")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--guide", type=Path, help="write the rows of `mimray plan`'s guide here")
    arguments = parser.parse_args()
    there = available()
    known = [*there, UNTRAINED, PIXELS, ADAPT]
    chosen = [name for name in arguments.only.split(",") if name] or known
    if wrong := [name for name in chosen if name not in known]:
        parser.error(f"--only {wrong[0]}: no such part; there are {', '.join(known)}")
    tests = [name for name in arguments.tests.split(",") if name] or list(TESTS)
    if wrong := [name for name in tests if name not in TESTS]:
        parser.error(f"--tests {wrong[0]}: no such score; there are {', '.join(TESTS)}")
    for name in MEMBERS.keys() - there.keys():
        print(f"{name} is left out: there is no recipe {MEMBERS[name].recipe}", flush=True)
    asked = {key: getattr(arguments, key) for key in ("minutes", "epochs", "limit")}
    family = Family(arguments.data.resolve(), arguments.out.resolve(), asked, tests)
    failed = run(family, chosen)
    family.keep()
    chart(family.found, family.out)
    print((family.out / "family.md").read_text())
    if arguments.json:
        arguments.json.write_text(json.dumps(family.found, indent=1) + "\n")
    if arguments.guide:
        arguments.guide.write_text(guide(family.found))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
