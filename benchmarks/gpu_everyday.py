"""Part `everyday` of gpu.py: the slow part of everyday.py, photographs and CIFAR-10, several rows side by side.

Rows go into everyday.csv in the folder --out, and `everyday.py --take` brings them into results/everyday.csv. What is
in one of the two is not run again.
First come plain training and three peers, on all seeds; then three networks averaged, and two peers. Data that did not
travel are left out. The weights of the pretrained body are tf_efficientnet_lite0.pth among the data.
"""
import os, time, warnings
from functools import partial
from gpu_protocol import begin, decode, side_by_side, unpack

ORDER = 'plain,jocor3', 'averaged,jocor2'

def keys(args, cells, Cell):
    "Cells, methods and seeds, the most valuable first"
    if args.tiny: return [(Cell('digits', 'symmetric 20', 1, 3e-3), name, 0) for name in ('plain','jocor3')]
    there = dict(clothing_photos='clothing', clothing_timm='clothing', cifar='cifar10')
    which = [c for c in cells('slow', there) if (args.path/there[c.data]).is_dir()]
    return [(c, name, seed) for names in ORDER for seed in range(3) for c in which for name in names.split(',')]

def row(path, until, key):
    "One row, or what went wrong, or `None` where it is too late to begin"
    import everyday
    if time.time() > until: return None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return everyday.run(*key, path)
        except Exception as e: return f'{type(e).__name__}: {e}'[:300]

def everyday(args, note):
    if not args.tiny:
        unpack(args.path)
        if (args.path/'cifar10').is_dir(): decode(args.path)
    weights = args.path/'tf_efficientnet_lite0.pth'
    if weights.exists(): os.environ['FASTAI_JOCOR_WEIGHTS'] = str(weights)
    from everyday import add_row, Cell, cells, KEY, rows
    begin(args.path, args.device)
    file = args.out/'everyday.csv'
    done = {tuple(o) for some in (rows(file), rows()) for o in some[KEY].itertuples(index=False)}
    todo = [(c, *o) for c,*o in keys(args, cells, Cell) if (*c, *o) not in done]
    spare = 2 if args.tiny else 20
    for key,res in side_by_side(args, partial(row, args.path, args.until-spare), todo):
        cell,name,seed = key
        what = f'{cell.data} {cell.noise} {cell.epochs} {name} seed {seed}'
        if isinstance(res, str): note(what, error=res)
        if not isinstance(res, dict): continue
        add_row(res, file)
        note(what, **{o: round(res[o], 4) for o in ('accuracy','worst_recall','seconds')})
