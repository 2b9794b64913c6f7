import time
from processes import *
from conftest import *
def test_x(dataset, tmp_path):
    d = dataset("f30k")
    m = save_small(tmp_path/"m.pt")
    argv=[*d.options,"--vision_model",str(m),"--context_length","12","--batch_size","7","--epochs","3","--lr","1e-3","--warmup","3","--noise_ratio","0.4","--num_workers","0","--device","cpu","--checkpoint_path",str(tmp_path/"logs")]
    for k in range(3):
        t=time.time(); print(run(NPC, argv, tmp_path/"out")[-300:]); print("T",time.time()-t)
    t=time.time(); print(run_in_two(NPC, argv, tmp_path/"out2")); print("T2",time.time()-t)
    import os; os.system(f"ls -la {tmp_path}/logs/ex0")
