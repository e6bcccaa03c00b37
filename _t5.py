import sys; sys.path.insert(0,'.')
import jax
jax.config.update("jax_enable_x64", True); jax.config.update("jax_numpy_dtype_promotion","strict")
from tests.problems.test_flows_step import *
x=jnp.asarray(CURVATURE)
for kap in (1e-3,1e-4,1e-5,0.):
    step=grid_step(kap)
    f=bilevel.solve(step,x,step.initial()).y
    B=bilevel.BilevelProblem(step,SecondMoment(step))
    h=bilevel.estimate(B,x,f); print(kap,h,h.gradient,h.adjoint_residual)
    J=jax.jacfwd(lambda f:step.optimality(x,f))(f); gy=jax.grad(lambda f:B.outer(x,f))(f); Fx=jax.jacfwd(lambda x:step.optimality(x,f))(x)
    gx=jax.grad(lambda x:B.outer(x,f))(x)
    v=jnp.linalg.solve(J.T,gy); print('  manual',gx-v@Fx, gx - gy@jnp.linalg.solve(J,Fx), jnp.abs(v).max(), jnp.abs(Fx).max(), gx)
    a=DENSITY; s=jnp.sqrt(a); S=s[:,None]*J/s[None]; print('  sym',jnp.abs(S-S.T).max(), gx-gy@(jnp.linalg.solve(S,s*Fx)/s), jnp.linalg.eigvalsh((S+S.T)/2)[jnp.array([0,-1])])
