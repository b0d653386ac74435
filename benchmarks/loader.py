"""Items per second of the in-memory loader, a `DataBlock` and a per-item `ToTensor` data set, in turn in one process.

    python benchmarks/loader.py --path ~/data/cifar10    # CIFAR-10 in folders: train/<class>/*.png or *.jpg
    python benchmarks/loader.py                          # 32×32 pieces of scikit-learn's two photographs

Writes results/loader.json. All read the same 32×32 images in batches of 128; `ToTensor` has its images in
memory, as torchvision's CIFAR has.
"""
import json, random, statistics, tempfile, time, numpy as np, torch
from pathlib import Path
from PIL import Image
from fastcore.script import call_parse
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Normalize, PILImage, cifar_stats,
                               get_image_files, parent_label)
from torchvision import transforms as T
from fastai_jocor.lab.run import machine
from fastai_jocor.lab.store import CropFlip
from fastai_jocor.lab.data import InMemoryDataLoaders

RESULTS = Path(__file__).resolve().parent/'results'

def pieces(folder, n):
    "Write n pieces of scikit-learn's photographs, a class for each photograph"
    from sklearn.datasets import load_sample_images
    rs = np.random.RandomState(0)
    for name,im in zip(('china','flower'), load_sample_images().images):
        (folder/name).mkdir()
        for i in range(n//2):
            y,x = rs.randint(im.shape[0]-32),rs.randint(im.shape[1]-32)
            PILImage.create(im[y:y+32,x:x+32]).save(folder/name/f'{i:05d}.png')

class PerItem(torch.utils.data.Dataset):
    "One image at a time through torchvision's transforms"
    def __init__(self, images, targets, tfm): self.images,self.targets,self.tfm = images,targets,tfm
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.tfm(Image.fromarray(self.images[i])),self.targets[i]

def rate(loader, at_least=.5):
    "Items per second over whole passes of at least half a second"
    n,start = 0,time.perf_counter()
    while True:
        for xb,_ in loader: n += len(xb)
        t = time.perf_counter()-start
        if t >= at_least: return n/t

def loaders(folder, files, augment):
    tfms = [CropFlip(), Normalize.from_stats(*cifar_stats)] if augment else None
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: files, get_y=parent_label,
                      splitter=IndexSplitter([0]), batch_tfms=tfms)
    dls = block.dataloaders(folder, bs=128, num_workers=0, device='cpu')
    store = InMemoryDataLoaders.from_dls(dls, progress=False).train.store
    own = dict(batch_tfms=[CropFlip()], normalize=cifar_stats) if augment else {}
    last = [len(files)-1]
    memory = InMemoryDataLoaders.from_arrays(store.images, store.targets, valid=last, bs=128, device='cpu', **own)
    tfms = [T.ToTensor()]
    if augment: tfms = [T.RandomCrop(32, 4), T.RandomHorizontalFlip(), *tfms, T.Normalize(*cifar_stats)]
    tfm = T.Compose(tfms)
    ds = PerItem(store.images[:-1].numpy(), store.targets[:-1], tfm)
    def per_item(w):
        return torch.utils.data.DataLoader(ds, 128, shuffle=True, drop_last=True, num_workers=w, persistent_workers=w>0)
    return {'in memory': memory.train, 'DataBlock, 0 workers': dls.train,
            **{f'ToTensor, {w} workers': per_item(w) for w in (0,2)}}

@call_parse
def main(
    path:str=None, # Folder of images; the training part is taken where there is one
    n:int=5001, # Images to take
    rounds:int=7 # Alternations
):
    "Measure, print and write the ratios"
    random.seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(path or tmp)
        if path is None: pieces(folder, n)
        files = get_image_files(folder/'train' if (folder/'train').is_dir() else folder).sorted().shuffle()[:n]
        data = 'scikit-learn photographs' if path is None else folder.name
        out = dict(data=data, images=len(files)-1, bs=128, rounds=rounds, machine=machine())
        for name,augment in (('plain',False),('crop, flip, normalise',True)):
            dls = loaders(folder, files, augment)
            for dl in dls.values(): rate(dl, 0)
            runs = {k: [] for k in dls}
            for _ in range(rounds):
                for k,dl in dls.items(): runs[k].append(rate(dl))
            print(f"\n{name}: items per second, and how many times faster the loader in memory is "
                  f"(median, lowest, highest of {rounds})")
            out[name] = {}
            for k,rates in runs.items():
                times = [a/b for a,b in zip(runs['in memory'], rates)]
                median,low,high = (round(f(times), 1) for f in (statistics.median,min,max))
                out[name][k] = dict(items_per_s=round(statistics.median(rates)), ratio=median, lowest=low, highest=high)
                print(f"  {k:22}{out[name][k]['items_per_s']:>10,}{median:>8}{low:>8}{high:>8}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS/'loader.json').write_text(json.dumps(out, indent=1)+'\n')
