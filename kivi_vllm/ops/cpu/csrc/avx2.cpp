#define KIVI_ISA avx2
#define KIVI_NAME "avx2"
#include "kernels.h"
