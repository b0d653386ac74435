"Train in processes that are killed at random moments, each going on from the last checkpoint, and once without interruption."
import os, random, signal, sys, time, torch
from pathlib import Path
from fastai.vision.all import Adam, Callback, Learner, SaveModelCallback, accuracy, noop, set_seed
from fastai_jocor.all import *
from fastai_jocor.lab.run import fast_adam

EPOCHS = 10

class Progress(Callback):
    order = 80
    def __init__(self, f): self.f = f
    def after_batch(self):
        if self.training: Path(self.f).write_text(f'{self.epoch} {self.iter} {self.n_iter}')

def learner(path, opt, seed):
    set_seed(seed)
    learn = Learner(digits_dls(noise=Symmetric(.4), seed=1, bs=16, batch_tfms=CropFlip(1, 0.)), jocor_mlp(10, 64), opt_func=opt, metrics=accuracy, path=path)
    learn.remove_cb(learn.progress); learn.logger = noop
    return learn

def train(path, opt, start=0):
    torch.set_num_threads(1)
    learn = learner(path, opt, 3 if start == 0 else 1000+start)
    cb = JoCorCallback(k=3, forget_rate='auto', num_gradual=8, watch=[5,50], balance=.5 if opt is fast_adam else 0.)
    if start: learn.to_peers(3).load(f'model_{start-1}', with_opt=True)
    learn.fit_one_cycle(EPOCHS, 4e-3, cbs=[cb, SaveModelCallback(every_epoch=True, with_opt=True), Progress(path/'progress')], start_epoch=start)
    torch.save(dict(weights=[p.detach() for p in learn.model.parameters()], history=cb.history.to_dict('list'), ledger=cb.items.state(), estimate=cb.estimate, watched=cb.watched, warm_up=cb.warm_up, table=[list(v) for v in learn.recorder.values[start:]],
                    opt=[{k: v for k,v in s.items()} for s in learn.opt.state_dict()['state']] if 'hypers' in learn.opt.state_dict() else learn.opt.state_dict()), path/'end.pt')

def in_child(*args):
    pid = os.fork()
    if pid == 0:
        try: train(*args); os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
    return pid

def last_checkpoint(path):
    "The newest checkpoint that can be read: a process may die while it writes one"
    for f in sorted((path/'models').glob('model_*.pth'), key=lambda f: -int(f.stem.split('_')[1])):
        try: torch.load(f, weights_only=False); return int(f.stem.split('_')[1])
        except Exception: pass
    return -1

def epoch_of(path):
    "The epoch in which the process is, -1 before its first batch"
    try: return int((path/'progress').read_text().split()[0])
    except (OSError, IndexError): return -1

def main(root, name):
    root,opt,rng = Path(root),dict(adam=Adam, fused=fast_adam)[name],random.Random(7)
    whole,cut = root/'whole',root/'cut'
    for p in (whole,cut): p.mkdir()
    begin = time.time()
    assert os.waitpid(in_child(whole, opt), 0)[1] == 0
    an_epoch = (time.time()-begin)/EPOCHS
    kills = []
    while len(kills) < 5:
        start = last_checkpoint(cut)+1
        assert start < EPOCHS, 'the run ended before it was killed five times'
        (cut/'progress').unlink(missing_ok=True)
        pid = in_child(cut, opt, start)
        while epoch_of(cut) < start + len(kills)%2: time.sleep(.001)
        time.sleep(rng.random()*.9*an_epoch)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        kills.append((cut/'progress').read_text())
    print(kills, flush=True)
    assert os.waitpid(in_child(cut, opt, last_checkpoint(cut)+1), 0)[1] == 0

if __name__ == '__main__': main(sys.argv[1], sys.argv[2])
