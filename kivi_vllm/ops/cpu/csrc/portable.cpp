#define KIVI_ISA portable
#define KIVI_NAME "portable"
#include "kernels.h"
