"Train in processes that are killed at random moments, each by the same line, and once without interruption."
import os, random, signal, sys, time, torch
from pathlib import Path
from fastai.vision.all import Adam, Callback, Learner, accuracy, noop, set_seed
from fastai_jocor.all import *
from fastai_jocor.evidence import evidence_state
from fastai_jocor.lab.run import fast_adam

EPOCHS = 10

class Progress(Callback):
    "Tell the epoch in which this process is"
    order = 80
    def __init__(self, f): self.f = f
    def after_batch(self):
        if self.training: Path(self.f).write_text(f'{self.epoch} {self.iter} {self.n_iter}')

def learner(path, opt, seed):
    set_seed(seed)
    dls = digits_dls(noise=Symmetric(.4), seed=1, bs=16, batch_tfms=CropFlip(1, 0.))
    learn = Learner(dls, jocor_mlp(10, 64), opt_func=opt, metrics=accuracy, path=path)
    learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn

def train(path, opt, seed=3):
    torch.set_num_threads(1)
    learn = learner(path, opt, seed)
    by_schedule = dict(forget_rate='auto', num_gradual=8, balance=.5)
    cb = JoCorCallback(k=3, **by_schedule) if opt is fast_adam else JoCorCallback(k=3)
    learn.fit_one_cycle(EPOCHS, 4e-3, cbs=[cb, Checkpoint(), Progress(path/'progress')])
    state = learn.opt.state_dict()
    if 'hypers' in state: state = [dict(o) for o in state['state']]
    torch.save(dict(weights=[p.detach() for p in learn.model.parameters()], history=cb.history.to_dict('list'),
                    ledger=cb.items.state(), estimate=cb.estimate, warm_up=cb.warm_up,
                    evidence=evidence_state(cb.evidence),
                    table=[list(v) for v in learn.recorder.values], opt=state), path/'end.pt')

def in_child(*args):
    pid = os.fork()
    if pid: return pid
    try:
        train(*args)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)

def epoch_of(path):
    "The epoch in which the process is, -1 before its first batch"
    try: return int((path/'progress').read_text().split()[0])
    except (OSError, IndexError): return -1

def finished_epochs(path):
    "What the checkpoint holds"
    try: return torch.load(path/'models'/'checkpoint.pth', weights_only=True)['epoch']
    except FileNotFoundError: return 0

def main(root, name):
    root,opt,rng = Path(root),dict(adam=Adam, fused=fast_adam)[name],random.Random(7)
    whole,cut = root/'whole',root/'cut'
    for p in (whole,cut): p.mkdir()
    begin = time.time()
    assert os.waitpid(in_child(whole, opt), 0)[1] == 0
    an_epoch = (time.time()-begin)/EPOCHS
    kills = []
    while len(kills) < 5:
        start = finished_epochs(cut)
        (cut/'progress').unlink(missing_ok=True)
        pid = in_child(cut, opt, 1000+start if start else 3)
        while epoch_of(cut) < min(start + len(kills)%2, EPOCHS-1): time.sleep(.001)
        time.sleep(rng.random()*.9*an_epoch)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1], 'the run ended before it was killed five times'
        kills.append((cut/'progress').read_text())
    print(kills, flush=True)
    assert os.waitpid(in_child(cut, opt, 2000), 0)[1] == 0

if __name__ == '__main__': main(sys.argv[1], sys.argv[2])
