#define KIVI_ISA avx512_vnni
#define KIVI_NAME "avx512_vnni"
#include "kernels.h"
