"""Stage 5: measure how good frozen patch features are without words (paper, supplement 10).

knn: a patch takes the labels of the nearest training patches. linear: a linear map from features
to classes is trained. panoptic: the true masks are given, and their mean features are classified.
In: a student's folder or the name of a backbone, labelled images to learn from and others to
score. Out: a table, the same as JSON, linear heads and label maps.

    python evaluate_probes.py                                    # the demo, in two folds
    python evaluate_probes.py --probe knn linear --dataset ade20k --data-root /data --compare
    python evaluate_probes.py --images few --masks masks --classes classes.txt     # in two folds
    python evaluate_probes.py --train-images A --train-masks B --images C --masks D --classes FILE
    python evaluate_probes.py --head runs/heads/NAME.safetensors --images photos --save-maps maps
    torchrun --nproc-per-node 4 evaluate_probes.py --dataset cityscapes --data-root /data --compare

The same command continues an interrupted run, also in the training of a linear head.
"""
from data.flags import (Parser, add_data_flags, add_device_flags, add_selection_flags, bounded,
                        ending, filled, parse)


def parse_args(argv=None):
    parser, positive, share = Parser(__doc__), bounded(int, 1), bounded(float, 1e-6, 1)
    add = parser.add_argument_group("probes").add_argument
    probes = ["knn", "linear", "panoptic"]
    add("--probe", nargs="+", choices=probes, default=probes, help="(default: all three)")
    add("--k", type=positive, default=30, help="knn: nearest patches that vote (%(default)s)")
    add("--temperature", type=share, default=0.02, help="knn: of the votes (%(default)s)")
    add("--bank-size", type=positive, metavar="N", help="knn: keep at most N training patches, "
        "equally many per image, rare classes first (default: all, never in memory together)")
    add("--train-share", type=share, default=1.0, metavar="P", help="knn: a random share of the "
        "training images (%(default)s; the paper: 0.5 of VOC, 0.3 of ADE20K)")
    add("--steps", type=positive, metavar="N", help="linear: steps of 16 images each (default: "
        "40000 for ade20k, 20000 for the other benchmarks, else 50)")
    add("--lr", type=bounded(float, 1e-12, 1e30), metavar="X", help="linear: first learning rate "
        "of AdamW, which falls to 0 (default: 1e-4 for benchmarks, else 3e-2)")
    add("--crop", type=positive, metavar="N", help="linear: train on random crops of N pixels with "
        "colour jitter and scales of 0.5 to 2, and test on windows of N pixels, as in the paper's "
        "\"repository resolution\": 512, Cityscapes 1024 (default: whole images)")
    add("--seeds", type=bounded(int, 0, 2 ** 43), nargs="+", default=[0], metavar="N",
        help="repeat what is random with each seed, and show mean and deviation (%(default)s)")
    add_selection_flags(parser)
    add_data_flags(parser)
    add = parser.add_argument_group("training data").add_argument
    add("--train-images", type=filled, metavar="DIR", help="your own images to learn from "
        "(default: two folds over --images, each half learnt from the other)")
    add("--train-masks", type=filled, metavar="DIR", help="their masks")
    add("--head", type=filled, metavar="FILE",
        help="do not train, but label --images by this linear head, into --save-maps (runs/maps)")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=ending(".json"), metavar="FILE", help="the results with every setting")
    add("--save-maps", type=filled, metavar="DIR", help="label maps of knn and linear, PCA images")
    add("--heads", type=filled, default="runs/heads", metavar="DIR",
        help="linear heads; one of the same data and settings is not trained again (%(default)s)")
    add("--keep-features", type=filled, metavar="{off,DIR}", help="keep float16 maps in DIR, "
        "for later runs too, or compute them for each probe (default: in --state until a method is "
        "done); as far as the disk has room")
    add("--state", type=filled, default="runs/probes", metavar="DIR",
        help="what an unfinished run has done; one folder for all processes (%(default)s)")
    add_device_flags(parser, seed="seed of random weights")
    return parse(parser, argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help and a wrong flag answer at once

import json
import shutil
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import default_stride, embed_texts, run_stage, save_tensors, start_runtime
from data.files import RunError, UsageError, reading, remove_stale_files, write_json
from data.benchmarks import (BENCHMARKS, Classes, check_data, check_masks, image_size,
                             open_benchmark, own_images, read_classes, read_mask)
from data.journal import files_state, text_hash
from data.results import describe_settings
from data.selection import find_datasets, maps_folder, read_selection
from evaluate_ovs import choose_methods, confusion_matrix
from extras.probes import (Features, Settings, bank, describe_head, head_logits, label_pixels,
                           match_segments, nearest, pooled_segments, print_results, probe_result,
                           read_head, train_head, vote)

# ---- the probes ----------------------------------------------------------------------------------

@dataclass
class Fold:
    """Images to learn from and images to score, by number, and a seed for what is random."""
    train: Features
    learn: range
    test: Features
    score: range
    seed: int
    number: int = 0

    @property
    def name(self):
        return f"{self.test.folder_name}-{self.seed}-{self.number}"


@dataclass
class Prober:
    """The probes. Each returns what this process counts in a fold, and in how many images."""
    settings: Settings
    texts: torch.Tensor | None  # (N, D) unit vectors of the class names, for panoptic
    state: Path  # folder of finished folds
    heads: Path  # how the paths of linear heads begin
    maps: Path | None  # folder of label maps
    features: Path  # folder of feature maps

    def knn(self, fold):
        """Label patches by their nearest training patches: a confusion matrix."""
        test = fold.test
        settings = self.settings
        test.keep(fold.score)
        grids = {}
        queries = [torch.zeros(0, test.dim, device=test.runtime.device)]
        for index, features in test.stream(test.share(fold.score)):
            grids[index] = features.shape[:2]
            vectors = features.flatten(0, 1).float()  # (h * w, D)
            queries.append(F.normalize(vectors, dim=-1).half())
        queries = torch.cat(queries)  # all at once, while the bank comes in chunks
        chunks = bank(fold.train, self.draw(fold), settings, fold.seed)
        cosines, rows, shares = nearest(queries, chunks, settings.k)  # (Q, k), (Q, k), (R, K)
        sizes = [height * width for height, width in grids.values()]

        def votes():
            for index, near, found in zip(grids, cosines.split(sizes), rows.split(sizes)):
                labels = vote(near, shares[found], settings.temperature)
                yield index, labels.unflatten(0, grids[index])
        return self.count_pixels(fold, "knn", votes())

    def linear(self, fold):
        """Label patches by a linear head: a confusion matrix."""
        test = fold.test
        crop = self.settings.crop
        head = self.head(fold)
        if not crop:  # crops have feature maps of their own
            test.keep(fold.score)
        logits = head_logits(head, test, test.share(fold.score), crop)
        return self.count_pixels(fold, "linear", logits)

    def panoptic(self, fold):
        """Name true masks by the most similar text: the counts of match_segments, with stuff as it
        is and merged."""
        test, classes = fold.test, fold.test.dataset.classes
        test.keep(fold.score)
        stuff = set(range(len(classes))) - test.dataset.things
        counts, images = torch.zeros(2, 4, len(classes), dtype=torch.float64), 0
        for pooled, areas, true in pooled_segments(test, test.share(fold.score)):
            names = (F.normalize(pooled, dim=-1) @ self.texts.T).argmax(1)  # (S, D) @ (D, N)
            found = classes.class_of_name[names.cpu()]
            counts[0] += match_segments(true, found, areas, len(classes))
            counts[1] += match_segments(true, found, areas, len(classes), stuff)
            images += 1
        return counts, images

    def draw(self, fold):
        """Draw the training images of kNN, and keep their feature maps."""
        count = max(1, round(self.settings.train_share * len(fold.learn)))
        kept = np.random.default_rng(fold.seed).permutation(len(fold.learn))[:count]
        learn = [fold.learn[k] for k in sorted(kept)]
        fold.train.keep(learn)
        return learn

    def head(self, fold):
        """Return the linear head, trained now unless its file is there."""
        train = fold.train
        crop = self.settings.crop
        path = Path(f"{self.heads}-{fold.name}.safetensors")
        if path.is_file():
            return read_head(path, train.runtime.device)[0]
        if not crop:
            train.keep(fold.learn, flips=(False, True))
        state = path.with_suffix(".pt")  # of an interrupted training
        head = train_head(train, fold.learn, self.settings, fold.seed, state)
        if train.runtime.rank == 0:
            save_tensors(head, path, {"probe": json.dumps(describe_head(train, crop))})
            state.unlink(missing_ok=True)
            images = "random crops" if crop else "whole images, without colour jitter"
            print(f"linear head in {path}: {self.settings.steps} steps on {images}")
        return head

    def count_pixels(self, fold, probe, logits_of_images):
        """Return the confusion matrix of images, from (index, logits (h, w, K)) of each."""
        test = fold.test
        images = 0
        count = len(test.dataset.classes)
        confusion = torch.zeros(count, count, dtype=torch.int64)
        for index, logits in logits_of_images:
            labels = read_mask(test.dataset, index)  # (H, W)
            predicted = label_pixels(logits, labels.shape)
            confusion += confusion_matrix(labels.to(predicted.device), predicted, count).cpu()
            images += 1
            if self.maps:
                test.draw(self.maps / test.folder_name / probe, index, predicted)
        return confusion, images

    def count(self, probe, train, test, seed):
        """Return what all processes count in one fold, or in two where train is test."""
        runtime = test.runtime
        total = images = 0
        learn = range(len(train.dataset.images))
        score = range(len(test.dataset.images))
        folds = [Fold(train, learn, test, score, seed)]
        if train is test:
            if len(learn) < 2:
                raise UsageError("two folds need two images; give --train-images, or more")
            folds = [Fold(train, learn[k::2], test, score[1 - k::2], seed, k) for k in (0, 1)]
        for fold in folds:
            path = self.state / f"{fold.name}-{probe}.json"
            if path.is_file():
                with reading(path, "delete it, and it is counted again"):
                    unit = json.loads(path.read_text())
                    counts = torch.tensor(unit["counts"], dtype=torch.float64)
                    scored = int(unit["images"])
            else:
                counts, scored = getattr(self, probe)(fold)
                counts = runtime.sum(counts.double().to(runtime.device)).cpu()
                scored = int(runtime.total(scored))  # by now, all have looked for the file
                if runtime.rank == 0:
                    write_json(path, {"counts": counts.tolist(), "images": scored})
            total += counts
            images += scored
        return total, images


def apply_head(args):
    """Label your own images by the linear head of a file."""
    maps = maps_folder(args.save_maps, args.images, labelled=False)
    runtime = start_runtime(args.device, args.precision, args.seed)
    head, about = read_head(args.head, runtime.device)
    methods = open_methods(read_selection(args), about["crop"], runtime)
    if len(methods) > 1:
        raise UsageError("--head takes one method: leave out --compare, and give one --stride")
    classes = Classes(about["classes"], about.get("background", False))
    dataset = own_images(args.images, None, classes, args.limit)
    features = Features(methods[0], dataset, runtime, args.workers, Path(args.state))
    now = describe_head(features, about["crop"])
    for key in ("weights", "stride", "window"):  # on which features depend
        if about[key] != now[key]:
            raise RunError(f"{args.head} was trained on features of {about['method']} of "
                           f"{about['backbone']}; {key} was {about[key]!r} and is {now[key]!r}")
    mine = features.share(range(len(dataset.images)))
    for index, logits in head_logits(head, features, mine, about["crop"]):
        size = image_size(dataset.root / dataset.images[index])
        features.draw(maps, index, label_pixels(logits, size))
    runtime.print(f"maps in {maps}")


# ---- main ----------------------------------------------------------------------------------------

def check_flags(args):
    """Raise UsageError for flags that do not go together."""
    if args.crop and "linear" not in args.probe:
        raise UsageError("--crop goes with --probe linear")
    if args.head and not args.images:
        raise UsageError("--head labels --images")
    for flag in ("masks", "dataset", "classes", "background", "json", "train_images"):
        if args.head and getattr(args, flag):
            raise UsageError(f"--head would ignore --{flag.replace('_', '-')}; leave it out")
    if bool(args.train_images) != bool(args.train_masks):
        raise UsageError("--train-images and --train-masks go together")
    if args.train_images and not args.images:
        raise UsageError("--train-images and --train-masks go with --images")
    if args.images and not (args.head or args.masks):
        raise UsageError("--images needs --masks")


def find_data(args):
    """Return functions that open the data sets, {"test": ..., "train": ...}, and which of these
    each probe learns from."""
    parts = dict.fromkeys(args.probe, "train")
    test, *others = find_datasets(args)
    if args.dataset in BENCHMARKS:
        opener = partial(open_benchmark, args.dataset, args.data_root, args.classes, args.limit)
        if "knn" in parts and "trainaug" in BENCHMARKS[args.dataset].layouts:
            parts["knn"] = "trainaug"  # VOC with the labels of SBD, as published
        openers = {part: partial(opener, part) for part in parts.values()}
        return {"test": partial(opener, panoptic="panoptic" in parts), **openers}, parts
    if others:
        raise UsageError(f"--dataset {args.dataset}: give one data set")
    if not args.train_images:
        return {"test": test}, dict.fromkeys(args.probe, "test")
    classes = read_classes(args.classes, args.background)
    train = partial(own_images, [args.train_images], args.train_masks, classes, args.limit)
    return {"test": test, "train": train}, parts


def choose_settings(args):
    """Return the settings of the probes."""
    chosen = {}
    if args.dataset in BENCHMARKS:  # benchmark-vfm-ss
        chosen = {"steps": 40_000 if args.dataset == "ade20k" else 20_000, "lr": 1e-4}
    for field in fields(Settings):
        value = getattr(args, field.name, None)
        if value is not None:
            chosen[field.name] = value
    return Settings(**chosen)


def open_methods(selection, crop, runtime):
    """Return the methods that the probes compare."""
    methods = choose_methods(selection, runtime,
                             lambda backbone, window: [default_stride(backbone.patch)])
    patch = methods[0].backbone.patch
    if crop and crop % patch:
        raise UsageError(f"--crop {crop}: must be a multiple of the patch, {patch}")
    return methods


def open_prober(args, settings, described, datasets, methods):
    """Return the Prober. The names of its folders hash what their content depends on."""
    test = datasets["test"]
    texts = None
    if "panoptic" in args.probe:
        # the last method has a text tower; the student's is the pre-trained one
        texts = embed_texts(methods[-1].backbone, test.classes.flat)
    files = [files_state(dataset) for dataset in datasets.values()]
    name = Path(test.name).name[:40]  # so that no path is too long
    # a fold that was finished without maps is not finished where maps are wanted
    state = Path(args.state) / text_hash([described, test.classes.names, files,
                                           args.save_maps])[:12]
    # a head does not depend on the settings of kNN, nor on how many heads there are
    others = ("k", "temperature", "bank_size", "train_share", "seeds", "checkpoint")
    linear = {key: value for key, value in described.items() if key not in others}
    learnt = text_hash([linear, test.classes.names, files])[:12]
    heads = Path(args.heads) / f"{name}-{learnt}"
    maps = Path(args.save_maps) if args.save_maps else None
    features = Path(args.keep_features or state / "features")
    return Prober(settings, texts, state, heads, maps, features)


def main(args):
    check_flags(args)
    if args.head:
        return apply_head(args)
    openers, parts = find_data(args)
    if args.check_data:
        return check_data(openers.values(), args.workers, whole=args.limit is None)
    datasets = {part: open_dataset() for part, open_dataset in openers.items()}
    runtime = start_runtime(args.device, args.precision, args.seed)
    settings = choose_settings(args)
    selection = read_selection(args)
    methods = open_methods(selection, settings.crop, runtime)
    for dataset in datasets.values():
        check_masks(dataset, runtime, args.workers)
    described = describe_settings(args, selection, methods, runtime) | asdict(settings)
    prober = open_prober(args, settings, described, datasets, methods)
    results = []
    for method in methods:
        features = {part: Features(method, dataset, runtime, args.workers, prober.features)
                    for part, dataset in datasets.items()}
        for probe, part in parts.items():
            draws = [prober.count(probe, features[part], features["test"], seed)
                     for seed in settings.useful_seeds(probe)]
            results.append(probe_result(probe, method.name, datasets["test"], draws))
        if runtime.rank == 0:
            shutil.rmtree(prober.state / "features", ignore_errors=True)
    if runtime.rank > 0:
        return
    print_results(results)
    if args.json:
        test = datasets["test"]
        described |= {"device": str(runtime.device), "classes": test.classes.names}
        write_json(args.json, {"dataset": test.name, "results": results, "settings": described})
        print(f"results in {args.json}")
    shutil.rmtree(prober.state)
    remove_stale_files(args.state, age=3600)  # others may be running
    remove_stale_files(args.heads, age=3600)


if __name__ == "__main__":
    run_stage(main, ARGS)
