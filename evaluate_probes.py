"""Stage 5: how good frozen patch features are without words (paper, supplement 10).

kNN: each patch is labelled by the patches of training pictures that are nearest to it; nothing is
trained. linear: a linear map from features to classes is. panoptic: the true masks are given, and
their mean features are named, by words, kNN or the linear head.

In: a student's folder (or a backbone's name), labelled pictures to learn from and others to score.
Out: a table, the same as JSON (--json), linear heads (--heads), label maps (--save-maps).

    python evaluate_probes.py                                    # the demo, in two folds
    python evaluate_probes.py --probe knn linear --dataset ade20k --data-root /data --compare
    python evaluate_probes.py --images few --masks masks --classes classes.txt     # in two folds
    python evaluate_probes.py --train-images A --train-masks B --images C --masks D --classes FILE
    python evaluate_probes.py --head runs/heads/NAME.safetensors --images photos --save-maps maps
    torchrun --nproc-per-node 4 evaluate_probes.py --dataset cityscapes --data-root /data --compare

Interrupted, the same command continues: features and finished probes are kept, a linear head in
training too.
"""
import argparse
import os
import signal


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("probes").add_argument
    add("--probe", nargs="+", choices=["knn", "linear", "panoptic"],
        default=["knn", "linear", "panoptic"], help="(default: all three)")
    add("--k", type=int, default=30, help="knn: nearest patches that vote (%(default)s)")
    add("--temperature", type=float, default=0.02, metavar="T",
        help="knn: of the softmax over their cosines (%(default)s)")
    add("--bank-size", type=int, metavar="N", help="knn: keep at most N training patches, as many "
        "of each picture, rare classes first (default: all; they are never in memory together)")
    add("--train-share", type=float, default=1.0, metavar="P", help="knn: a random share of the "
        "training pictures, from 0 to 1 (%(default)s; the paper: 0.5 of VOC, 0.3 of ADE20K)")
    add("--ignored", choices=["left-out", "class0"], default="left-out", help="knn: training "
        "pixels of 255; class0 does as open-hummingbird-eval (%(default)s)")
    add("--steps", type=int, metavar="N", help="linear: of 16 pictures each (default: 40000 for "
        "ade20k, 20000 for other benchmarks, else 50)")
    add("--lr", type=float, metavar="X", help="linear: AdamW's first learning rate, which falls to "
        "0 (default: 1e-4 for benchmarks, else 3e-2, for few steps)")
    add("--crop", type=int, metavar="N", help="linear: random crops of N pixels with colour jitter "
        "and scales of 0.5 to 2, and windows of N at test time (the paper's repository resolution: "
        "512, Cityscapes 1024; default: whole pictures at their own size)")
    add("--classifier", choices=["text", "knn", "linear"], default="text",
        help="panoptic: what names a mask (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N",
        help="one draw each of what is random: their mean and deviation are shown (%(default)s)")
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--checkpoint", help="a student: a folder that distill.py wrote (default: runs/spar); or, "
        "with --backbone, a file with an official SPAR state dict")
    add("--backbone", help="evaluate this pre-trained model instead (as in evaluate_ovs.py)")
    add("--random-init", action="store_true", help="the architecture without weights, for tests")
    add("--positions", choices=["size", "scale"], help="of an official checkpoint file: see "
        "evaluate_ovs.py")
    add("--inference", choices=["single-pass", "sliding-window"])
    add("--stride", type=int, nargs="+", metavar="N", help="pixels between sliding windows, whose "
        "features are stitched (default: 1.5 patches)")
    add("--window", type=int, metavar="N", help="side of the sliding window (default: native)")
    add("--compare", action=argparse.BooleanOptionalAction, help="pre-trained single pass, "
        "pre-trained sliding window and student in one table (default: on for the demo)")
    add("--hub-dir", metavar="DIR", help="dinov3txt: a clone of its repository")
    add("--dinov3-weights", nargs=2, metavar=("BACKBONE", "TEXT"), help="dinov3txt: its two files")
    add = parser.add_argument_group("on what").add_argument
    add("--dataset", metavar="NAME", help="demo (default, unless --images is given), voc21, voc20, "
        "cityscapes, ade20k, context60 or context59, with its training pictures")
    add("--data-root", default="data", metavar="DIR", help="of the benchmarks (%(default)s)")
    add("--check-data", action="store_true", help="only look at the files of both parts")
    add("--images", metavar="DIR", help="own pictures to score")
    add("--masks", metavar="DIR", help="their label masks: PNG files of the same relative names")
    add("--train-images", metavar="DIR", help="own pictures to learn from (default: two folds over "
        "--images, each learnt from the other)")
    add("--train-masks", metavar="DIR", help="their label masks")
    add("--classes", metavar="FILE|NAMES", help="a file with one class a line, or names")
    add("--limit", type=int, metavar="N", help="the first N pictures only, to learn and to score")
    add("--head", metavar="FILE", help="train nothing: label --images by this linear head, into "
        "--save-maps (runs/maps)")
    add = parser.add_argument_group("what to write").add_argument
    add("--json", metavar="FILE", help="write the results with every setting to FILE")
    add("--save-maps", metavar="DIR", help="label maps, overlays and PCAs of knn and linear")
    add("--heads", default="runs/heads", metavar="DIR", help="linear heads (%(default)s)")
    add("--keep-features", default="auto", metavar="{auto,off,DIR}", help="float16 features on a "
        "disk, which each probe reads: in DIR, which the next run finds; in --state, until a "
        "method is done, if there is room; or nowhere: each probe encodes anew (%(default)s)")
    add("--state", metavar="DIR", default="runs/probes",
        help="what an unfinished run has done, one folder for all processes (%(default)s)")
    add = parser.add_argument_group("with what").add_argument
    add("--batch-size", type=int, default=60, help="most windows per forward pass (%(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="threads that read ahead (default: one a core, at most 8)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the "
        "backbone (%(default)s: fp16 on a GPU, fp32 on a CPU); probes compute in fp32")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch's import, so that --help and a wrong flag answer at once
    ARGS = parse_args()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until command_line: no import's traceback

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (RunFailed, WrongCall, atomic_path, bilinear_strips, command_line,
                    default_stride, embed_texts, nearest_multiple, prefetch, read_image, read_json,
                    speaks_flags, start_runtime, weights_hash, write_json)
from data.benchmarks import (BENCHMARKS, Classes, check_data, check_masks, nearest_labels,
                             own_pictures, picture_size, read_mask)
from data.crops import logits_of, random_crop
from data.drawing import save_maps
from data.features import Features, keep_features, name_absent, open_folds
from data.probes import (Knn, Training, bank, neighbours, read_head, save_head, segments_of,
                         train_head, vote)
from data.scores import confusion_matrix, match_segments, print_probes, probe_result
from evaluate_ovs import files_state, label_map, maps_folder, plain_methods, text_hash

# ---- one method's probes -------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """What is probed, and how."""
    knn: Knn
    training: Training
    classifier: str
    texts: torch.Tensor | None  # (N, D) unit vectors of the class names, for classifier "text"

    def draws(self, probe, seeds):
        """The seeds that make a difference."""
        probe = self.classifier if probe == "panoptic" else probe
        sampled = self.knn.train_share < 1 or self.knn.bank_size
        return seeds if probe == "linear" or probe == "knn" and sampled else seeds[:1]


class Prober:
    """The probes of one method on one fold by one seed. Each returns what this process counted, and
    in how many pictures.

    features: of the pictures to learn from and of those to score. state: a path without its ending,
    for what an unfinished run keeps; maps: a folder for label maps, or None.
    """

    def __init__(self, plan, fold, seed, features, runtime, state, maps=None):
        self.plan, self.fold, self.seed, self.runtime = plan, fold, seed, runtime
        self.train, self.test = features
        self.state, self.maps = state, maps
        self.classes = fold.test.classes
        self.mine = fold.score[runtime.rank::runtime.world]

    def knn(self):
        """In-context segmentation: a confusion matrix."""
        grids, queries = {}, [torch.zeros(0, self.test.dim, device=self.test.device)]
        for index, features in self.test.stream(self.mine, "kNN, to score"):
            grids[index] = features.shape[:2]
            queries.append(F.normalize(features.flatten(0, 1).float(), dim=-1).half())
        knn, queries = self.plan.knn, torch.cat(queries)
        chunks = bank(self.train, knn.draw(self.fold.learn, self.seed), knn, self.seed)
        found = neighbours(queries, chunks, knn.k)

        def votes():
            first = 0
            for index, grid in grids.items():
                some = slice(first, first := first + math.prod(grid))
                yield index, vote(*found(some), knn.temperature).view(*grid, -1)
        return self.score(votes())

    def linear(self):
        """The linear head: a confusion matrix."""
        return self.score(logits_of(self.head(), self.test, self.mine, self.plan.training.crop))

    def panoptic(self):
        """True masks, named: match_segments' counts, as they are and with stuff merged (2, 4, K).
        """
        dataset, count = self.test.dataset, len(self.classes)
        tested = list(segments_of(self.test, self.mine))
        vectors = torch.cat([torch.zeros(0, self.test.dim, device=self.test.device),
                             *(each for each, _, _ in tested)])
        predicted = self.name_segments(vectors).split([len(classes) for _, _, classes in tested])
        counts, stuff = torch.zeros(2, 4, count), set(range(count)) - dataset.things
        for (_, areas, true), named in zip(tested, predicted):
            for row, merged in enumerate([(), stuff]):
                counts[row] += match_segments(true, named, areas, count, merged)
        return counts, len(tested)

    def name_segments(self, vectors):
        """Mean features (S, D) -> classes (S,), by the plan's classifier."""
        if self.plan.classifier == "linear":
            return self.head()(vectors).argmax(1).cpu()
        vectors = F.normalize(vectors, dim=-1)
        if self.plan.classifier == "text":
            return self.classes.owner[(vectors @ self.plan.texts.T).argmax(1).cpu()]
        knn, count = self.plan.knn, len(self.classes)
        learnt = segments_of(self.train, knn.draw(self.fold.learn, self.seed))
        chunks = ((F.normalize(each, dim=-1), F.one_hot(classes, count).half())
                  for each, _, classes in learnt)
        found = neighbours(vectors, chunks, knn.k)
        return vote(*found(slice(None)), knn.temperature).argmax(1).cpu()

    def score(self, items):
        """The confusion matrix of pictures, from the (index, logits (h, w, K)) of each."""
        count, pictures = len(self.classes), 0
        confusion = torch.zeros(count, count, dtype=torch.int64)
        for index, logits in items:
            labels = read_mask(self.test.dataset, index)
            predicted = plain_labels(logits, labels.shape)
            confusion += confusion_matrix(labels, predicted, count)
            pictures += 1
            if self.maps:
                draw(self.maps, self.test, index, predicted, self.classes)
        return confusion, pictures

    def head(self):
        """The linear head, trained unless it was before."""
        path = self.state.with_name(self.state.name + "-head.safetensors")
        if not path.is_file():
            torch.manual_seed(self.seed)
            head = torch.nn.Linear(self.train.dim, len(self.classes)).to(self.train.device)
            train_head(head, self.batches, self.train.encode, self.plan.training, self.runtime,
                       path.with_suffix(".pt"))
            if self.runtime.rank == 0:
                save_head(path, head, describe_head(self.train, self.plan.training))
            self.runtime.barrier()
        return read_head(path, self.train.device)[0]

    def batches(self, start):
        """This process's (map or pixels, labels) of each step from `start` on, read ahead."""
        training, runtime = self.plan.training, self.runtime
        schedule = training.schedule(self.fold.learn, self.seed)

        def sample(place):
            index, flip = schedule[place]
            labels = read_mask(self.train.dataset, index)
            labels = labels.flip(-1) if flip else labels
            if training.crop:
                image = self.train.pixels(index, flip)
                return (None, None) if image is None else random_crop(
                    image, labels, training.crop, np.random.default_rng([self.seed, place]))
            sides = [nearest_multiple(side, self.train.patch) for side in labels.shape]
            return self.train.load(index, flip), nearest_labels(labels, sides)

        def batch(step):
            first, last = step * training.pictures, (step + 1) * training.pictures
            samples = map(sample, range(first + runtime.rank, last, runtime.world))
            return [each for each in samples if each[0] is not None and each[0].numel()]
        return prefetch(batch, range(start, training.steps), self.train.workers)


def plain_labels(logits, size):
    """(h, w, K) -> the largest of each pixel, enlarged bilinearly: (*size) int64."""
    owner = torch.arange(logits.shape[-1])
    return label_map(bilinear_strips(logits, size), size, owner).cpu()


def draw(folder, features, index, labels, classes):
    image = read_image(features.dataset.root / features.dataset.images[index])
    each = features.encode(features.load(index)).float()
    save_maps(folder, features.dataset.images[index], image, labels, each, classes)


# ---- running them --------------------------------------------------------------------------------

def choose_training(args):
    """The linear probe's settings: published for benchmarks, else for few pictures and steps."""
    published = dict.fromkeys(BENCHMARKS, 20_000) | {"ade20k": 40_000}
    steps = args.steps or published.get(args.dataset, 50)
    return Training(steps, args.lr or (1e-4 if args.dataset in published else 3e-2), args.crop)


def describe_head(features, training):
    """What a linear head's file says of it."""
    method, classes = features.method, features.dataset.classes
    return {"method": method.name, "backbone": method.origin, "stride": method.stride,
            "window": method.stride and list(method.window), "weights": weights_hash(
                method.backbone), "crop": training.crop, "classes": classes.names}


def apply_head(args, runtime):
    """--head: label maps of own pictures. Raises WrongCall or RunFailed."""
    if not args.images or args.masks:
        raise WrongCall("--head labels --images, without --masks")
    head, about = read_head(args.head, runtime.device)
    methods, classes = plain_methods(args, runtime), Classes(about["classes"])
    features = Features(methods[0], own_pictures(args.images, None, classes, args.limit),
                        workers=args.workers)
    if len(methods) > 1:
        raise RunFailed("--head takes one method")
    if head.in_features != features.dim:
        raise RunFailed(f"{args.head} takes {head.in_features} features, the backbone has "
                        f"{features.dim}")
    now = describe_head(features, Training(1, 1, about["crop"]))
    folder = maps_folder(args.save_maps, args.images, labelled=False)
    for key in ("weights", "stride", "window"):
        if now[key] != about[key]:
            raise RunFailed(f"{args.head} was trained on features of {about['method']} of "
                            f"{about['backbone']}; {key} was {about[key]!r} and is {now[key]!r}")
    dataset = features.dataset
    mine = range(runtime.rank, len(dataset.images), runtime.world)
    items = logits_of(head, features, mine, about["crop"])
    for index, logits in tqdm(items, total=len(mine), unit="map", disable=runtime.rank > 0):
        size = picture_size(dataset.root / dataset.images[index])
        draw(folder, features, index, plain_labels(logits, size), classes)
    print(f"maps in {folder}")


def needed(folds, plan, seeds):
    """The maps that all probes read: {a data set's id: (it, sorted (index, flip))}."""
    jobs = {}
    for probe, some in folds.items():
        trained = probe == "linear" or probe == "panoptic" and plan.classifier == "linear"
        flips = (False, True) if trained and not plan.training.crop else (False,)
        for fold in some:
            draws = [plan.knn.draw(fold.learn, seed) for seed in seeds]
            learnt = fold.learn if probe != "knn" else {k for draw in draws for k in draw}
            for dataset, each in ((fold.test, [(k, False) for k in fold.score]),
                                  (fold.train, [(k, flip) for k in learnt for flip in flips])):
                jobs.setdefault(id(dataset), (dataset, set()))[1].update(each)
    return {key: (dataset, sorted(some)) for key, (dataset, some) in jobs.items()}


def probe_method(method, folds, plan, args, runtime, state):
    """Every probe of a method on every fold by every seed: {probe: {seed: (counts, pictures)}}."""
    label, jobs = method.name.replace("/", "-"), needed(folds, plan, args.seeds)
    units = [(probe, seed, k, state / f"{label}-{probe}-{seed}-{k}.json")
             for probe, some in folds.items() for seed in plan.draws(probe, args.seeds)
             for k in range(len(some))]
    todo = {path for *_, path in units if not path.is_file()}
    runtime.barrier()  # all have looked
    sources = {key: Features(method, dataset, None, args.workers, runtime.rank > 0)
               for key, (dataset, _) in jobs.items()}
    if todo:
        need = sum(sources[key].bytes(some) for key, (_, some) in jobs.items())
        folder = keep_features(args.keep_features, state / f"{label}-features", need, runtime)
    look = [weights_hash(method.backbone), method.stride, method.window, runtime.precision]
    for key, (dataset, some) in jobs.items() if todo and folder else ():
        sources[key].folder = folder / text_hash([look, files_state(dataset)])[:12]
        sources[key].fill(some, runtime)
    runtime.barrier()
    for probe, seed, k, path in (unit for unit in units if unit[-1] in todo):
        fold, maps = folds[probe][k], args.save_maps and Path(args.save_maps) / label / probe
        counts, images = PROBES[probe](Prober(
            plan, fold, seed, (sources[id(fold.train)], sources[id(fold.test)]), runtime,
            path.with_suffix("").with_name(f"{label}-{seed}-{k}"), maps))
        counts = runtime.add_up(counts.double().to(runtime.device)).tolist()
        images = int(runtime.total(images))
        if runtime.rank == 0:
            write_json(path, {"counts": counts, "images": images})
    runtime.barrier()
    if runtime.rank == 0:
        shutil.rmtree(state / f"{label}-features", ignore_errors=True)
    counted = {}
    for probe, seed, _, path in units:
        unit = read_json(path, "the same command", {"counts": list, "images": int})
        seeds = counted.setdefault(probe, {})
        before, images = seeds.get(seed, (0, 0))
        seeds[seed] = (before + torch.tensor(unit["counts"]).double(), images + unit["images"])
    return counted


PROBES = {"knn": Prober.knn, "linear": Prober.linear, "panoptic": Prober.panoptic}


# ---- main ----------------------------------------------------------------------------------------

def copy_heads(state, folder, dataset):
    """Finished linear heads to where users look for them."""
    for path in sorted(state.glob("*-head.safetensors")):
        to = Path(folder) / f"{Path(dataset).name}-{path.name}"
        with atomic_path(to) as temporary:
            shutil.copyfile(path, temporary)
        print(f"linear head in {to}")


@speaks_flags
def main(args):
    if args.json and Path(args.json).suffix != ".json":
        raise WrongCall(f"--json {args.json}: must end in .json")
    if args.crop and "linear" not in (*args.probe, args.classifier):
        raise WrongCall("--crop goes with --probe linear")
    if args.head:
        return apply_head(args, start_runtime(args.device, args.precision))
    folds = open_folds(args)
    datasets = {id(each): each for some in folds.values() for fold in some
                for each in (fold.train, fold.test)}
    if args.check_data:
        if sum(check_data(each, args.workers, args.limit is None) for each in datasets.values()):
            raise RunFailed("the data has the problems listed above")
        return
    runtime = start_runtime(args.device, args.precision)
    methods = plain_methods(args, runtime, lambda backbone, _: [default_stride(backbone.patch)])
    training, patch = choose_training(args), methods[0].backbone.patch
    if training.crop and training.crop % patch:
        raise WrongCall(f"--crop {training.crop}: must be a multiple of the patch, {patch}")
    present = {key: check_masks(each, runtime, args.workers).numpy()
               for key, each in datasets.items()}
    test, texts = next(iter(folds.values()))[0].test, None
    if "panoptic" in args.probe and args.classifier == "text":
        # the student's text tower is the pre-trained one
        texts = embed_texts(methods[-1].backbone, test.classes.flat)
    knn = Knn(args.k, args.temperature, args.bank_size, args.train_share, args.ignored)
    plan = Plan(knn, training, args.classifier, texts)
    settings = {
        "backbone": methods[0].origin, "random_init": args.random_init,
        "checkpoint": args.checkpoint or (None if args.backbone else "runs/spar"),
        "weights": {each.name: weights_hash(each.backbone) for each in methods},
        "window": args.window, "knn": asdict(knn), "linear": asdict(training),
        "classifier": args.classifier, "seeds": args.seeds, "limit": args.limit,
        "precision": runtime.precision, "torch": torch.__version__,
        "open_clip": open_clip.__version__}
    state = Path(args.state) / text_hash([settings, test.classes.names, args.save_maps, [
        files_state(each) for each in datasets.values()]])[:12]
    if runtime.rank == 0:
        state.mkdir(parents=True, exist_ok=True)
        name_absent(folds, present)
        if "linear" in args.probe:
            print(f"linear: {training.steps} steps, " + ("random crops with colour jitter" if
                  training.crop else "whole pictures and their flips, no colour jitter"))
    results = []
    for method in methods:
        counted = probe_method(method, folds, plan, args, runtime, state)
        results += [probe_result(probe, method.name, test, draws)
                    for probe, draws in counted.items()]
    if runtime.rank > 0:
        return
    print_probes(results)
    copy_heads(state, args.heads, test.name)
    if args.json:
        settings |= {"device": str(runtime.device), "classes": test.classes.names}
        write_json(args.json, {"dataset": test.name, "results": results, "settings": settings})
        print(f"results in {args.json}")
    shutil.rmtree(state)


if __name__ == "__main__":
    command_line(main, ARGS)
