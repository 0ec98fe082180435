import os, time, torch, collections, pickle
from tests.harness import run_world
from tests.parity import test_pipeline as tp
from windlass.dist import comm as C
from windlass.dist.comm import Pending
import tempfile
def patch(folder):
    seqs=collections.Counter()
    def send(self, tensor, to, *, tag="", label=""):
        for t in to:
            k=(self.name,self.ranks[self.rank],self.ranks[t]); n=seqs[k]; seqs[k]+=1
            f=f"{folder}/{self.name.replace(' ','_')}-{k[1]}-{k[2]}-{n}"
            with open(f+".tmp","wb") as fh: pickle.dump((label,tensor.detach().clone()),fh)
            os.rename(f+".tmp",f)
        return Pending(lambda: None)
    def receive(self, out, source, *, tag="", label=""):
        k=(self.name,self.ranks[source],self.ranks[self.rank],'r'); n=seqs[k]; seqs[k]+=1
        f=f"{folder}/{self.name.replace(' ','_')}-{k[1]}-{k[2]}-{n}"
        def fin():
            t0=time.time()
            while not os.path.exists(f):
                time.sleep(0.0005)
                if time.time()-t0>4: raise RuntimeError("timeout "+label+" "+f)
            l,t=pickle.load(open(f,"rb")); os.unlink(f)
            assert l==label,(l,label)
            assert t.shape==out.shape and t.dtype==out.dtype,(t.shape,out.shape,t.dtype,out.dtype,label)
            out.copy_(t)
        return Pending(fin)
    C.Group.send=send; C.Group.receive=receive
    old=C.Comm.group
    C.Comm.group=lambda self, ranks, name, private=False: old(self, ranks, name)
def go(comm, folder, cases):
    patch(folder); return tp.train_all(comm, cases)
def check(ranks, cases):
    with tempfile.TemporaryDirectory() as folder:
        for i,case in enumerate(cases):
            d=f"{folder}/{i}"; os.mkdir(d)
            try:
                res=run_world(ranks, go, d, [case], timeout_s=10.)
                tp.compare(case, [r[0] for r in res], tp.plain(case), 1.0)
                print("ok", case.schedule, case.vocab, case.micro_batches, case.zero.stage, case.zero.reshard)
            except BaseException as e:
                import traceback; traceback.print_exc()
                print("FAIL", case.schedule, case.vocab, case.micro_batches, type(e), str(e)[-200:], getattr(e,"__notes__","")); 
def test_a():
    check(2, [c for c in tp.EVERY if c.schedule in os.environ.get("S","1f1b").split(",") and c.vocab in os.environ.get("V","off,1,2").split(",")])
from dataclasses import replace
from windlass.parallel.zero import ZeroConfig
def test_b():
    base=[c for c in tp.EVERY if c.schedule in ("1f1b","vhalf") ]
    check(4, [replace(c, columns=2, zero=ZeroConfig(stage=s, reshard=r)) for c in base for s,r in ((0,"auto"),(1,"auto"),(2,"auto"),(3,"run"),(3,"each"),(3,"never"))])
def test_c():
    changes = [
        {"loss": tp.ALL_LOSSES},
        {"loss": tp.ALL_LOSSES, "weights": True},
        {"recompute": "recompute"},
        {"frozen": ("embed",)},
        {"frozen": ("embed", "blocks.0", "blocks.1")},
        {"frozen": ("head",)},
        {"no_labels": True},
        {"pipeline": {"vocab_chunk": 16}},
        {"optimizer": tp.OptimizerConfig(clip_norm=0.01)},
    ]
    shapes = (("1f1b", "off"), ("zb1p", "1"), ("vhalf", "2"))
    check(2, [tp.Case(s, v, **change) for change in changes for s, v in shapes])
def test_d():
    check(4, [replace(c, micro_batches=m) for c in tp.EVERY for m in (1,5) if c.model.tie_embeddings])
