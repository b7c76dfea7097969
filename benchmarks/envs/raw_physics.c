// mj_step and mj_rnePostConstraint over many simulations on a few threads: the rate that no Python around MuJoCo exceeds.
#include <mujoco/mujoco.h>
#include <pthread.h>
#include <stdatomic.h>

typedef struct {
  const mjModel* model;
  mjData** data;
  const double* ctrl;
  int num;
  int substeps;
  atomic_int* next;
} Work;

static void* run(void* argument) {
  Work* work = argument;
  int nu = work->model->nu;
  for (int i = (*work->next)++; i < work->num; i = (*work->next)++) {
    mjData* data = work->data[i];
    for (int k = 0; k < nu; k++) data->ctrl[k] = work->ctrl[i * nu + k];
    for (int k = 0; k < work->substeps; k++) mj_step(work->model, data);
    mj_rnePostConstraint(work->model, data);
  }
  return 0;
}

void step_all(const mjModel* model, mjData** data, const double* ctrl, int num, int substeps, int threads) {
  atomic_int next = 0;
  Work work = {model, data, ctrl, num, substeps, &next};
  pthread_t handles[64];
  for (int t = 1; t < threads; t++) pthread_create(&handles[t], 0, run, &work);
  run(&work);
  for (int t = 1; t < threads; t++) pthread_join(handles[t], 0);
}
