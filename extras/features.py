"""What a method sees of a data set's images: feature maps, which are kept on a disk."""
import numpy as np
import torch
from tqdm import tqdm

from common import prefetch, prepare, weights_hash
from data.files import RunError, free_bytes, read_image, reading, save_array
from data.journal import files_state, text_hash
from extras.drawing import save_maps

SPARE = 10 ** 9  # bytes of a disk that kept feature maps leave free


class Features:
    """The feature maps (h, w, D) float16 of a data set, as a method sees it.

    keep_in: the folder in which they are kept for later probes, restarted runs and torchrun's
    other processes. A map that is not kept is computed whenever it is needed. An image that
    cannot be read has a map without patches.
    """

    def __init__(self, method, dataset, runtime, workers, keep_in):
        self.method, self.dataset = method, dataset
        self.runtime, self.workers = runtime, workers
        self.patch, self.dim = method.backbone.patch, method.backbone.dim
        self.is_full = False
        depends = [weights_hash(method.backbone), method.stride, method.window, runtime.precision,
                   files_state(dataset)]
        self.folder = keep_in / text_hash(depends)[:12]

    @property
    def no_vectors(self):
        return torch.zeros(0, self.dim, device=self.runtime.device)

    def path(self, index, flip):
        return self.folder / f"{index}{'-flip' * flip}.npy"

    def read(self, index, flip=False):
        """Read an image: (3, H, W) uint8, or None if it cannot be read."""
        try:
            image = read_image(self.dataset.root / self.dataset.images[index])
        except RunError as error:
            tqdm.write(f"left out: {error}")
            return None
        return image.flip(-1) if flip else image

    def load(self, index, flip=False):
        """Load the kept feature map, or else the image."""
        path = self.path(index, flip)
        if not path.is_file():
            return self.read(index, flip)
        with reading(path, "delete it, and it is computed again"):
            return torch.from_numpy(np.load(path))

    def encode(self, loaded):
        """Return the feature map of what was loaded, on the device."""
        if loaded is None:
            loaded = torch.zeros(0, 0, self.dim, dtype=torch.float16)
        if loaded.dtype == torch.uint8:
            prepared = prepare(self.method.backbone, loaded)
            loaded = self.method.features(prepared).half()
        return loaded.to(self.runtime.device)

    def stream(self, indices):
        """Yield (index, feature map) of the readable images, in order."""
        loaded_maps = prefetch(self.load, indices, self.workers)
        for index, loaded in zip(self.progress(indices), loaded_maps):
            features = self.encode(loaded)
            if features.numel():
                yield index, features

    def keep(self, indices, flips=(False,)):
        """Compute this process's share of the feature maps that are not kept yet, as long as the
        disk has room."""
        jobs = [(index, flip) for index in indices for flip in flips]
        # shared out by position, so that what other processes write meanwhile changes no share
        mine = [job for job in self.share(jobs) if not self.path(*job).is_file()]
        images = prefetch(lambda job: self.read(*job), mine, self.workers)
        for job, image in zip(self.progress(mine), images):
            if free_bytes(self.folder) < SPARE:
                if not self.is_full:
                    tqdm.write(f"the disk of {self.folder} is full; not all feature maps are kept")
                self.is_full = True
                break
            save_array(self.path(*job), self.encode(image).cpu().numpy())
        self.runtime.barrier()

    def draw(self, folder, index, labels):
        """Write the label map, the overlay and the PCA of an image."""
        name, classes = self.dataset.images[index], self.dataset.classes
        features = self.encode(self.load(index)).float()
        save_maps(folder, name, read_image(self.dataset.root / name), labels, features, classes)

    def share(self, items):
        """Return this process's share of some items."""
        return items[self.runtime.rank::self.runtime.world]

    def progress(self, items):
        return tqdm(items, f"{self.dataset.name}, {self.method.name}", unit="map", leave=False,
                    disable=self.runtime.rank > 0 or not items)
